package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// result is what one run of the load found out. Latencies are in microseconds.
type result struct {
	Requests  int64         `json:"requests"`
	Errors    int64         `json:"errors"`
	Statuses  map[int]int64 `json:"statuses"`
	Seconds   float64       `json:"seconds"`
	Rate      float64       `json:"rate"`
	P50       float64       `json:"p50"`
	P99       float64       `json:"p99"`
	Max       float64       `json:"max"`
	Handshake float64       `json:"handshake"`
}

// client sends requests over one connection of one caller, one at a time.
type client interface {
	ask(path string) (int, error)
	close()
}

// plain speaks HTTP/1.1 over one TLS connection with as little work as will do.
type plain struct {
	conn   *tls.Conn
	reader *bufio.Reader
	host   string
}

func (c *plain) ask(path string) (int, error) {
	request := "GET " + path + " HTTP/1.1\r\nhost: " + c.host + "\r\nuser-agent: load/1.0\r\naccept: */*\r\naccept-encoding: gzip\r\nx-tenant: blue\r\n\r\n"
	if _, err := io.WriteString(c.conn, request); err != nil {
		return 0, err
	}
	answer, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, answer.Body)
	answer.Body.Close()
	return answer.StatusCode, err
}

func (c *plain) close() { c.conn.Close() }

// framed speaks HTTP/2 over one connection.
type framed struct {
	http *http.Client
	base string
}

func (c *framed) ask(path string) (int, error) {
	request, err := http.NewRequest("GET", c.base+path, nil)
	if err != nil {
		return 0, err
	}
	request.Header.Set("user-agent", "load/1.0")
	request.Header.Set("x-tenant", "blue")
	answer, err := c.http.Do(request)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, answer.Body)
	answer.Body.Close()
	return answer.StatusCode, err
}

func (c *framed) close() { c.http.CloseIdleConnections() }

func configs(dirs []string) []*tls.Config {
	var made []*tls.Config
	for _, dir := range dirs {
		pair, err := tls.LoadX509KeyPair(dir+"/cert.pem", dir+"/key.pem")
		if err != nil {
			log.Fatal(err)
		}
		roots, err := os.ReadFile(dir + "/ca.pem")
		if err != nil {
			log.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(roots)
		made = append(made, &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, MinVersion: tls.VersionTLS12})
	}
	return made
}

func load(args []string) {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	address := flags.String("address", "127.0.0.1:8443", "where the gateway listens")
	host := flags.String("host", "bench.example", "host to ask for")
	identities := flags.String("identities", "", "glob of identity folders; each is a caller with connections of its own")
	connections := flags.Int("connections", 32, "connections, shared out over the callers")
	workers := flags.Int("workers", 32, "requests in flight (closed loop)")
	total := flags.Int64("requests", 20000, "requests in all")
	seconds := flags.Float64("seconds", 0, "stop after this long even if fewer were sent; 0 for no limit")
	rate := flags.Float64("rate", 0, "requests a second, counted from when each was due; 0 for a closed loop")
	paths := flags.Int("paths", 1, "how many different paths, taken by Zipf's law")
	exponent := flags.Float64("zipf", 1.1, "exponent of Zipf's law")
	prefix := flags.String("prefix", "/catalog/", "what every path begins with")
	two := flags.Bool("h2", false, "HTTP/2 instead of HTTP/1.1")
	seed := flags.Int64("seed", 1, "seed of the choice of callers and paths")
	idle := flags.Bool("idle", false, "only open the connections, print a line, and hold them until standard input ends")
	flags.Parse(args)

	dirs, _ := filepath.Glob(*identities)
	if len(dirs) == 0 {
		log.Fatalf("no identities at %s", *identities)
	}
	slices.Sort(dirs)
	callers := configs(dirs)
	began := time.Now()
	clients := make([]client, *connections)
	for i := range clients {
		config := callers[i%len(callers)].Clone()
		config.ServerName = *host
		clients[i] = connect(*address, *host, config, *two)
	}
	out := result{Statuses: map[int]int64{}, Handshake: float64(time.Since(began).Microseconds()) / float64(*connections)}
	if *idle {
		fmt.Println("open")
		io.Copy(io.Discard, os.Stdin)
		return
	}

	locks := make([]sync.Mutex, len(clients))
	var sent, failed atomic.Int64
	var lock sync.Mutex
	var latencies []float64
	start := time.Now()
	var group sync.WaitGroup
	for w := range *workers {
		group.Add(1)
		go func() {
			defer group.Done()
			random := rand.New(rand.NewSource(*seed*1000 + int64(w)))
			zipf := rand.NewZipf(random, *exponent, 1, uint64(max(*paths-1, 1)))
			var mine []float64
			statuses := map[int]int64{}
			for {
				n := sent.Add(1) - 1
				if n >= *total || (*seconds > 0 && time.Since(start).Seconds() > *seconds) {
					break
				}
				due := time.Now()
				if *rate > 0 {
					due = start.Add(time.Duration(float64(n) / *rate * float64(time.Second)))
					time.Sleep(time.Until(due))
				}
				index := w % len(clients)
				if len(clients) > *workers {
					index = random.Intn(len(clients))
				}
				path := *prefix + "1"
				if *paths > 1 {
					path = *prefix + fmt.Sprint(zipf.Uint64())
				}
				locks[index].Lock()
				status, err := clients[index].ask(path)
				if err != nil {
					failed.Add(1)
					clients[index].close()
					config := callers[index%len(callers)].Clone()
					config.ServerName = *host
					clients[index] = connect(*address, *host, config, *two)
				}
				locks[index].Unlock()
				if err == nil {
					statuses[status]++
					mine = append(mine, float64(time.Since(due).Nanoseconds())/1000)
				}
			}
			lock.Lock()
			latencies = append(latencies, mine...)
			for status, n := range statuses {
				out.Statuses[status] += n
			}
			lock.Unlock()
		}()
	}
	group.Wait()
	out.Seconds = time.Since(start).Seconds()
	out.Requests = int64(len(latencies))
	out.Errors = failed.Load()
	out.Rate = float64(out.Requests) / out.Seconds
	if len(latencies) > 0 {
		slices.Sort(latencies)
		out.P50 = latencies[len(latencies)/2]
		out.P99 = latencies[len(latencies)*99/100]
		out.Max = latencies[len(latencies)-1]
	}
	json.NewEncoder(os.Stdout).Encode(out)
}

func connect(address, host string, config *tls.Config, two bool) client {
	if two {
		config.NextProtos = []string{"h2"}
		transport := &http.Transport{
			TLSClientConfig: config, ForceAttemptHTTP2: true, MaxConnsPerHost: 1,
			DialTLSContext: nil,
		}
		dialer := &net.Dialer{}
		transport.DialContext = dialer.DialContext
		return &framed{http: &http.Client{Transport: &fixed{transport, address, host}}, base: "https://" + host}
	}
	config.NextProtos = []string{"http/1.1"}
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		log.Fatalf("%s: %v", address, err)
	}
	return &plain{conn: conn, reader: bufio.NewReader(conn), host: host}
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
