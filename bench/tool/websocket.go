package main

import (
	"bufio"
	"crypto/rand"
	"crypto/sha1"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
)

// A WebSocket (RFC 6455) as far as echoing binary messages needs one: no fragments, no extensions.

const (
	binaryFrame = 0x82
	closeFrame  = 0x88
	masked      = 0x80
)

// socket is one end of a WebSocket.
type socket struct {
	conn   net.Conn
	reader *bufio.Reader
	client bool
	out    []byte
}

func acceptOf(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

func openSocket(address, host string, config *tls.Config) (pipe, error) {
	conn := dialled(address, config)
	nonce := make([]byte, 16)
	rand.Read(nonce)
	key := base64.StdEncoding.EncodeToString(nonce)
	asked := "GET /catalog/socket HTTP/1.1\r\nhost: " + host + "\r\nuser-agent: load/1.0\r\nconnection: Upgrade\r\nupgrade: websocket\r\n" +
		"sec-websocket-version: 13\r\nsec-websocket-key: " + key + "\r\n\r\n"
	if _, err := io.WriteString(conn, asked); err != nil {
		return nil, err
	}
	reader := bufio.NewReaderSize(conn, 64*1024)
	answer, err := http.ReadResponse(reader, nil)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != 101 || answer.Header.Get("sec-websocket-accept") != acceptOf(key) {
		return nil, fmt.Errorf("no WebSocket: %s", answer.Status)
	}
	return &socket{conn: conn, reader: reader, client: true}, nil
}

// frame writes one frame, with its head and by one call.
func (s *socket) frame(kind byte, payload []byte) error {
	out := append(s.out[:0], kind)
	mask := byte(0)
	if s.client {
		mask = masked
	}
	switch size := len(payload); {
	case size < 126:
		out = append(out, mask|byte(size))
	case size < 1<<16:
		out = binary.BigEndian.AppendUint16(append(out, mask|126), uint16(size))
	default:
		out = binary.BigEndian.AppendUint64(append(out, mask|127), uint64(size))
	}
	if s.client {
		out = append(out, maskKey[:4]...)
	}
	head := len(out)
	out = append(out, payload...)
	if s.client {
		xor(out[head:])
	}
	s.out = out
	_, err := s.conn.Write(out)
	return err
}

// maskKey is the same for all frames: neither a gateway nor this upstream looks at it.
var maskKey = func() []byte {
	made := make([]byte, longest)
	for i := range made {
		made[i] = "\x3d\xa1\x07\xf2"[i%4]
	}
	return made
}()

func xor(data []byte) { subtle.XORBytes(data, data, maskKey[:len(data)]) }

// read is the next frame.
func (s *socket) read() (byte, []byte, error) {
	var head [14]byte
	if _, err := io.ReadFull(s.reader, head[:2]); err != nil {
		return 0, nil, err
	}
	size := uint64(head[1] &^ masked)
	switch size {
	case 126:
		if _, err := io.ReadFull(s.reader, head[2:4]); err != nil {
			return 0, nil, err
		}
		size = uint64(binary.BigEndian.Uint16(head[2:4]))
	case 127:
		if _, err := io.ReadFull(s.reader, head[2:10]); err != nil {
			return 0, nil, err
		}
		size = binary.BigEndian.Uint64(head[2:10])
	}
	if (head[1]&masked != 0) == s.client || size > longest {
		return 0, nil, fmt.Errorf("a frame that begins %x", head[:2])
	}
	if !s.client {
		if _, err := io.ReadFull(s.reader, head[10:14]); err != nil {
			return 0, nil, err
		}
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(s.reader, payload); err != nil {
		return 0, nil, err
	}
	if !s.client {
		xor(payload)
	}
	return head[0], payload, nil
}

func (s *socket) send(message []byte) error { return s.frame(binaryFrame, message) }

func (s *socket) receive() ([]byte, error) {
	kind, payload, err := s.read()
	if err == nil && kind != binaryFrame {
		err = fmt.Errorf("a frame of kind %x", kind)
	}
	return payload, err
}

// end closes the WebSocket, which the other side must answer.
func (s *socket) end() error {
	defer s.conn.Close()
	if err := s.frame(closeFrame, []byte{0x03, 0xe8}); err != nil {
		return err
	}
	kind, _, err := s.read()
	if err == nil && kind != closeFrame {
		err = fmt.Errorf("a frame of kind %x in answer to a close", kind)
	}
	return err
}

func (s *socket) close() { s.conn.Close() }

// serveSocket answers with what it is sent, each message as it comes.
func serveSocket(w http.ResponseWriter, r *http.Request) {
	hijacker, ok := w.(http.Hijacker)
	if !ok {
		http.Error(w, "WebSockets are for HTTP/1.1", http.StatusBadRequest)
		return
	}
	conn, buffered, err := hijacker.Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: "+
		acceptOf(r.Header.Get("sec-websocket-key"))+"\r\n\r\n")
	s := &socket{conn: conn, reader: bufio.NewReaderSize(buffered.Reader, 64*1024)}
	for {
		kind, payload, err := s.read()
		if err != nil || s.frame(kind, payload) != nil || kind == closeFrame {
			return
		}
	}
}
