package main

import (
	"crypto/tls"
	"flag"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
)

const (
	// usual is how many bytes an answer's body has when the request does not say.
	usual = 256
	// wantedHeader says how many bytes the answer is to have.
	wantedHeader = "x-answer-bytes"
	// gotHeader says how many bytes of a body came, if they were the right ones.
	gotHeader = "x-request-bytes"
)

var buffers = sync.Pool{New: func() any { made := make([]byte, 64*1024); return &made }}

// answer serves a body of the wanted size, and says what it was sent.
func answer(w http.ResponseWriter, r *http.Request) {
	if strings.EqualFold(r.Header.Get("upgrade"), "websocket") {
		serveSocket(w, r)
		return
	}
	if r.ContentLength == 0 {
		io.Copy(io.Discard, r.Body)
	} else {
		buffer := buffers.Get().(*[]byte)
		count, same, err := compare(r.Body, *buffer)
		buffers.Put(buffer)
		got := strconv.Itoa(count)
		if !same || err != nil {
			got += ", and not the right ones"
		}
		w.Header().Set(gotHeader, got)
	}
	size := usual
	if wanted, err := strconv.Atoi(r.Header.Get(wantedHeader)); err == nil {
		size = wanted
	}
	body := pattern(size)
	w.Header().Set("content-type", "text/plain")
	w.Header().Set("content-length", strconv.Itoa(len(body)))
	w.Write(body)
}

// upstream serves over mutual TLS: HTTP/1.1, HTTP/2 and WebSockets at one address, gRPC at another.
func upstream(args []string) {
	flags := flag.NewFlagSet("upstream", flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:9100", "address to listen at")
	rpc := flags.String("grpc", "127.0.0.1:9101", "address to listen at for gRPC")
	dir := flags.String("identity", "", "folder with cert.pem, key.pem and ca.pem")
	flags.Parse(args)
	pair, err := tls.LoadX509KeyPair(*dir+"/cert.pem", *dir+"/key.pem")
	if err != nil {
		log.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: roots(*dir), ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12}
	listener, err := net.Listen("tcp", *rpc)
	if err != nil {
		log.Fatal(err)
	}
	go serveRPC(listener, config.Clone())
	config.NextProtos = []string{"h2", "http/1.1"}
	server := &http.Server{Addr: *listen, Handler: http.HandlerFunc(answer), TLSConfig: config, ErrorLog: log.New(io.Discard, "", 0)}
	log.Fatal(server.ListenAndServeTLS("", ""))
}
