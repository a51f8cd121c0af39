package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
)

// upstream serves a fixed answer of a given size over mutual TLS, HTTP/1.1 and HTTP/2.
func upstream(args []string) {
	flags := flag.NewFlagSet("upstream", flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:9100", "address to listen at")
	dir := flags.String("identity", "", "folder with cert.pem, key.pem and ca.pem")
	size := flags.Int("size", 256, "bytes of the answer's body")
	flags.Parse(args)
	body := strings.Repeat("x", *size)
	pool := x509.NewCertPool()
	roots, err := os.ReadFile(*dir + "/ca.pem")
	if err != nil || !pool.AppendCertsFromPEM(roots) {
		log.Fatalf("%s/ca.pem: %v", *dir, err)
	}
	server := &http.Server{
		Addr: *listen,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("content-type", "text/plain")
			io.WriteString(w, body)
		}),
		TLSConfig: &tls.Config{ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	log.Fatal(server.ListenAndServeTLS(*dir+"/cert.pem", *dir+"/key.pem"))
}
