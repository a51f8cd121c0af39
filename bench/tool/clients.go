package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
)

// client sends requests over one connection of one caller, one at a time. An answer that came, and is not the one that was asked for, is a
// wrongAnswer: the connection can go on.
type client interface {
	ask(path string) error
	close()
}

type wrongAnswer struct{ why string }

func (w wrongAnswer) Error() string { return w.why }

func wrong(format string, values ...any) error { return wrongAnswer{fmt.Sprintf(format, values...)} }

// plain speaks HTTP/1.1 over one TLS connection with as little work as will do.
type plain struct {
	conn   *tls.Conn
	reader *bufio.Reader
	host   string
	sizes  sizes
	buffer []byte
}

func (c *plain) ask(path string) error {
	method, more := "GET ", ""
	if c.sizes.upload > 0 {
		method, more = "POST ", "content-length: "+strconv.Itoa(c.sizes.upload)+"\r\n"
	}
	if c.sizes.answer > 0 {
		more += wantedHeader + ": " + strconv.Itoa(c.sizes.answer) + "\r\n"
	}
	request := method + path + " HTTP/1.1\r\nhost: " + c.host + "\r\nuser-agent: load/1.0\r\naccept: */*\r\naccept-encoding: gzip\r\nx-tenant: blue\r\n" + more + "\r\n"
	if _, err := io.WriteString(c.conn, request); err != nil {
		return err
	}
	if c.sizes.upload > 0 {
		if _, err := c.conn.Write(pattern(c.sizes.upload)); err != nil {
			return err
		}
	}
	answer, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	return c.sizes.check(answer, c.buffer)
}

func (c *plain) close() { c.conn.Close() }

// framed speaks HTTP/2 over one connection.
type framed struct {
	http   *http.Client
	base   string
	sizes  sizes
	buffer []byte
}

func (c *framed) ask(path string) error {
	var body io.Reader
	method := "GET"
	if c.sizes.upload > 0 {
		method, body = "POST", bytes.NewReader(pattern(c.sizes.upload))
	}
	request, err := http.NewRequest(method, c.base+path, body)
	if err != nil {
		return err
	}
	request.Header.Set("user-agent", "load/1.0")
	request.Header.Set("x-tenant", "blue")
	if c.sizes.answer > 0 {
		request.Header.Set(wantedHeader, strconv.Itoa(c.sizes.answer))
	}
	answer, err := c.http.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.ProtoMajor != 2 {
		return wrong("answered by %s", answer.Proto)
	}
	return c.sizes.check(answer, c.buffer)
}

func (c *framed) close() { c.http.CloseIdleConnections() }

// sizes says how many bytes of body a request has, and its answer (0: as many as the upstream likes).
type sizes struct{ upload, answer int }

// check reads an answer to its end, and says whether it is the right one.
func (s sizes) check(answer *http.Response, buffer []byte) error {
	size := s.answer
	if size == 0 {
		size = usual
	}
	count, same, err := compare(answer.Body, buffer)
	if err != nil {
		return err
	}
	switch {
	case answer.StatusCode != 200:
		return wrong("status %d", answer.StatusCode)
	case count != size || !same:
		return wrong("an answer of %d bytes, the right ones: %t; %d were to come", count, same, size)
	case s.upload > 0 && answer.Header.Get(gotHeader) != strconv.Itoa(s.upload):
		return wrong("of a body of %d bytes there arrived: %q", s.upload, answer.Header.Get(gotHeader))
	}
	return nil
}

// compare reads to the end: how many bytes, and whether they are those of the pattern.
func compare(body io.Reader, buffer []byte) (int, bool, error) {
	count, same := 0, true
	for {
		got, err := body.Read(buffer)
		same = same && count+got <= longest && bytes.Equal(buffer[:got], letters[count:count+got])
		count += got
		if err == io.EOF {
			return count, same, nil
		}
		if err != nil {
			return count, same, err
		}
	}
}

// longest is how many bytes a body or a message has at most.
const longest = 1 << 20

var letters = func() []byte {
	made := make([]byte, longest)
	for i := range made {
		made[i] = 'a' + byte((i^i>>8)%26)
	}
	return made
}()

// pattern is the first bytes of what every body consists of.
func pattern(size int) []byte { return letters[:min(size, longest)] }

func configs(dirs []string) []*tls.Config {
	var made []*tls.Config
	for _, dir := range dirs {
		pair, err := tls.LoadX509KeyPair(dir+"/cert.pem", dir+"/key.pem")
		if err != nil {
			log.Fatal(err)
		}
		made = append(made, &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots(dir), MinVersion: tls.VersionTLS12})
	}
	return made
}

func roots(dir string) *x509.CertPool {
	read, err := os.ReadFile(dir + "/ca.pem")
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(read) {
		log.Fatalf("%s/ca.pem: %v", dir, err)
	}
	return pool
}

// dialled is a TLS connection for HTTP/1.1.
func dialled(address string, config *tls.Config) *tls.Conn {
	config.NextProtos = []string{"http/1.1"}
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		log.Fatalf("%s: %v", address, err)
	}
	return conn
}

func connect(kind, address, host string, config *tls.Config, sizes sizes) client {
	buffer := make([]byte, 64*1024)
	switch kind {
	case "h1":
		conn := dialled(address, config)
		return &plain{conn: conn, reader: bufio.NewReader(conn), host: host, sizes: sizes, buffer: buffer}
	case "h2":
		config.NextProtos = []string{"h2"}
		transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, MaxConnsPerHost: 1, DialContext: (&net.Dialer{}).DialContext}
		return &framed{http: &http.Client{Transport: &fixed{transport, address, host}}, base: "https://" + host, sizes: sizes, buffer: buffer}
	case "grpc":
		return &unary{conn: dialledRPC(address, host, config), size: sizes.upload}
	}
	log.Fatalf("-kind %s: one of h1, h2, grpc, stream, websocket", kind)
	return nil
}

// fixed sends every request to one address, whatever its host.
type fixed struct {
	transport *http.Transport
	address   string
	host      string
}

func (f *fixed) RoundTrip(request *http.Request) (*http.Response, error) {
	request.Host = f.host
	request.URL.Host = f.address
	return f.transport.RoundTrip(request)
}

func (f *fixed) CloseIdleConnections() { f.transport.CloseIdleConnections() }
