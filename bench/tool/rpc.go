package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

const (
	unaryMethod  = "/bench.Echo/Unary"
	streamMethod = "/bench.Echo/Stream"
)

// raw passes messages as they are.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(value any) ([]byte, error) {
	if message, ok := value.([]byte); ok {
		return message, nil
	}
	return nil, fmt.Errorf("a message of type %T", value)
}

func (raw) Unmarshal(data []byte, value any) error {
	*value.(*[]byte) = bytes.Clone(data)
	return nil
}

func dialledRPC(address, host string, config *tls.Config) *grpc.ClientConn {
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithAuthority(host), grpc.WithUserAgent("load/1.0"),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})), grpc.WithIdleTimeout(0),
	}
	conn, err := grpc.NewClient("passthrough:///"+address, options...)
	if err != nil {
		log.Fatal(err)
	}
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if state == connectivity.TransientFailure {
			log.Fatalf("%s: no connection for gRPC", address)
		}
		conn.WaitForStateChange(context.Background(), state)
	}
	return conn
}

// unary makes calls, one at a time.
type unary struct {
	conn *grpc.ClientConn
	size int
	made uint64
}

func (c *unary) ask(string) error {
	c.made++
	sent := message(c.made, c.size)
	var got []byte
	if err := c.conn.Invoke(context.Background(), unaryMethod, sent, &got); status.Code(err) == codes.Unavailable {
		return err
	} else if err != nil {
		return wrong("%v", err)
	}
	if !bytes.Equal(sent, got) {
		return wrong("a message of %d bytes came back as another one, of %d", len(sent), len(got))
	}
	return nil
}

func (c *unary) close() { c.conn.Close() }

// stream is one call that streams in both directions.
type stream struct {
	grpc.ClientStream
	conn *grpc.ClientConn
}

func openStream(address, host string, config *tls.Config) (pipe, error) {
	conn := dialledRPC(address, host, config)
	described := &grpc.StreamDesc{StreamName: "Stream", ServerStreams: true, ClientStreams: true}
	made, err := conn.NewStream(context.Background(), described, streamMethod)
	return &stream{made, conn}, err
}

func (s *stream) send(message []byte) error { return s.SendMsg(message) }

func (s *stream) receive() ([]byte, error) {
	var got []byte
	err := s.RecvMsg(&got)
	return got, err
}

// end ends the call, which must succeed.
func (s *stream) end() error {
	defer s.conn.Close()
	if err := s.CloseSend(); err != nil {
		return err
	}
	var more []byte
	if err := s.RecvMsg(&more); err != io.EOF {
		return fmt.Errorf("the call did not end well: %v", err)
	}
	return nil
}

func (s *stream) close() { s.conn.Close() }

// serveRPC answers with what it is sent, each message as it comes.
func serveRPC(listener net.Listener, config *tls.Config) {
	described := grpc.ServiceDesc{
		ServiceName: "bench.Echo",
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			var message []byte
			err := decode(&message)
			return message, err
		}}},
		Streams: []grpc.StreamDesc{{StreamName: "Stream", ServerStreams: true, ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
			for {
				var message []byte
				if err := stream.RecvMsg(&message); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
				if err := stream.SendMsg(message); err != nil {
					return err
				}
			}
		}}},
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)), grpc.ForceServerCodec(raw{}))
	server.RegisterService(&described, struct{}{})
	log.Fatal(server.Serve(listener))
}
