package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// result is what one run of the load found out. Latencies are in microseconds.
type result struct {
	// Requests, or messages, that were answered as they should be.
	Requests int64 `json:"requests"`
	// Errors are those without a complete answer, Wrong those with another answer than the right one; First is the first of either.
	Errors  int64   `json:"errors"`
	Wrong   int64   `json:"wrong"`
	First   string  `json:"first"`
	Seconds float64 `json:"seconds"`
	Rate    float64 `json:"rate"`
	P50     float64 `json:"p50"`
	P99     float64 `json:"p99"`
	Max     float64 `json:"max"`
}

// findings of one goroutine.
type findings struct {
	latencies     []float64
	errors, wrong int64
	first         error
}

func (f *findings) right(took time.Duration) {
	f.latencies = append(f.latencies, float64(took.Nanoseconds())/1000)
}

func (f *findings) failed(err error) {
	if f.first == nil {
		f.first = err
	}
	var answer wrongAnswer
	if errors.As(err, &answer) {
		f.wrong++
	} else {
		f.errors++
	}
}

// total is the sum of what the goroutines found.
func total(all []findings, took time.Duration) result {
	out := result{Seconds: took.Seconds()}
	var latencies []float64
	for _, each := range all {
		latencies = append(latencies, each.latencies...)
		out.Errors += each.errors
		out.Wrong += each.wrong
		if each.first != nil && out.First == "" {
			out.First = each.first.Error()
		}
	}
	out.Requests = int64(len(latencies))
	out.Rate = float64(out.Requests) / out.Seconds
	if len(latencies) > 0 {
		slices.Sort(latencies)
		out.P50 = latencies[len(latencies)/2]
		out.P99 = latencies[len(latencies)*99/100]
		out.Max = latencies[len(latencies)-1]
	}
	return out
}

// options are those of one run.
type options struct {
	kind, address, host, identities, prefix string
	connections, workers, paths             int
	requests, seed                          int64
	rate, exponent                          float64
	hold, idle                              bool
	sizes                                   sizes
	window                                  int
}

func load(args []string) {
	var o options
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	flags.StringVar(&o.kind, "kind", "h1", "h1, h2 or grpc (requests), stream or websocket (messages)")
	flags.StringVar(&o.address, "address", "127.0.0.1:8443", "where the gateway listens")
	flags.StringVar(&o.host, "host", "bench.example", "host to ask for")
	flags.StringVar(&o.identities, "identities", "", "glob of identity folders; each is a caller with connections of its own")
	flags.IntVar(&o.connections, "connections", 32, "connections, shared out over the callers; each has one stream of messages, if it has any")
	flags.IntVar(&o.workers, "workers", 32, "requests in flight (closed loop)")
	flags.Int64Var(&o.requests, "requests", 20000, "requests, or messages, in all")
	flags.Float64Var(&o.rate, "rate", 0, "requests a second, counted from when each was due; 0 for a closed loop")
	flags.IntVar(&o.paths, "paths", 1, "how many different paths, taken by Zipf's law")
	flags.Float64Var(&o.exponent, "zipf", 1.1, "exponent of Zipf's law")
	flags.StringVar(&o.prefix, "prefix", "/catalog/", "what every path begins with")
	flags.Int64Var(&o.seed, "seed", 1, "seed of the choice of callers and paths")
	flags.IntVar(&o.sizes.upload, "upload", 0, "bytes of a request's body, or of a message")
	flags.IntVar(&o.sizes.answer, "answer", 0, "bytes of an answer's body")
	flags.IntVar(&o.window, "window", 1, "messages on their way through one stream")
	flags.BoolVar(&o.hold, "hold", false, "open and use the connections first, print a line, and begin at a line of standard input")
	flags.BoolVar(&o.idle, "idle", false, "only open the connections, print a line, and hold them until standard input ends")
	flags.Parse(args)

	dirs, _ := filepath.Glob(o.identities)
	if len(dirs) == 0 {
		log.Fatalf("no identities at %s", o.identities)
	}
	slices.Sort(dirs)
	if o.sizes.upload > longest || o.sizes.answer > longest {
		log.Fatalf("bodies and messages have %d bytes at most", longest)
	}
	var out result
	if o.kind == "stream" || o.kind == "websocket" {
		out = o.messages(dirs)
	} else {
		out = o.asked(dirs)
	}
	json.NewEncoder(os.Stdout).Encode(out)
}

// ready waits for a line of standard input, after saying that all is open; false when there is none.
func ready() bool {
	fmt.Println("open")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	return err == nil
}

// asked sends requests.
func (o options) asked(dirs []string) result {
	callers := configs(dirs)
	connected := func(index int) client {
		config := callers[index%len(callers)].Clone()
		config.ServerName = o.host
		return connect(o.kind, o.address, o.host, config, o.sizes)
	}
	clients := make([]client, o.connections)
	for i := range clients {
		clients[i] = connected(i)
		if o.hold {
			if err := clients[i].ask(o.prefix + "1"); err != nil {
				log.Fatalf("the first request: %v", err)
			}
		}
	}
	if (o.hold || o.idle) && !ready() {
		return result{}
	}
	locks := make([]sync.Mutex, len(clients))
	found := make([]findings, o.workers)
	var sent atomic.Int64
	start := time.Now()
	var group sync.WaitGroup
	for w := range o.workers {
		group.Add(1)
		go func() {
			defer group.Done()
			random := rand.New(rand.NewSource(o.seed*1000 + int64(w)))
			zipf := rand.NewZipf(random, o.exponent, 1, uint64(max(o.paths-1, 1)))
			for {
				n := sent.Add(1) - 1
				if n >= o.requests {
					break
				}
				due := time.Now()
				if o.rate > 0 {
					due = start.Add(time.Duration(float64(n) / o.rate * float64(time.Second)))
					time.Sleep(time.Until(due))
				}
				index := w % len(clients)
				if len(clients) > o.workers {
					index = random.Intn(len(clients))
				}
				path := o.prefix + "1"
				if o.paths > 1 {
					path = o.prefix + fmt.Sprint(zipf.Uint64())
				}
				locks[index].Lock()
				err := clients[index].ask(path)
				if err == nil {
					found[w].right(time.Since(due))
				} else {
					found[w].failed(err)
					if answer := (wrongAnswer{}); !errors.As(err, &answer) {
						clients[index].close()
						clients[index] = connected(index)
					}
				}
				locks[index].Unlock()
			}
		}()
	}
	group.Wait()
	return total(found, time.Since(start))
}

// messages sends messages through streams.
func (o options) messages(dirs []string) result {
	callers := configs(dirs)
	opened := func(index int) pipe {
		config := callers[index%len(callers)].Clone()
		config.ServerName = o.host
		return openPipe(o.kind, o.address, o.host, config)
	}
	pipes := make([]pipe, o.connections)
	var first atomic.Int64
	for i := range pipes {
		var warm findings
		pipes[i] = opened(i)
		first.Store(1)
		through(pipes[i], o.sizes.upload, 1, &first, &warm)
		if warm.first != nil {
			log.Fatalf("the first message: %v", warm.first)
		}
	}
	if (o.hold || o.idle) && !ready() {
		return result{}
	}
	found := make([]findings, len(pipes))
	var left atomic.Int64
	left.Store(o.requests)
	start := time.Now()
	var group sync.WaitGroup
	for i := range pipes {
		group.Add(1)
		go func() {
			defer group.Done()
			for through(pipes[i], o.sizes.upload, o.window, &left, &found[i]) {
				pipes[i] = opened(i)
			}
		}()
	}
	group.Wait()
	took := time.Since(start)
	for i := range pipes {
		if err := pipes[i].end(); err != nil {
			found[i].failed(err)
		}
	}
	return total(found, took)
}
