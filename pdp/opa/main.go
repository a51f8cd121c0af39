// Command opa-worker evaluates Rego for one parent process.
//
// It is OPA's own compiler, planner and evaluator behind pipelined frames on a socket that it inherits. It listens on
// nothing, writes nothing to disk and ends when its socket does, so that it can never outlive the process that asked for it.
//
// Bounds: evaluations have deadlines, and the process a memory limit: a policy that eats memory ends this worker and
// nothing else. See frames.go for the protocol.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	exitUsage  = 2
	exitSocket = 3
	exitMemory = 4
)

func main() {
	fd := flag.Int("fd", 3, "the inherited socket's file descriptor")
	page := flag.Int("slots", -1, "an inherited shared page that names the running evaluations; see slots.go")
	threads := flag.Int("threads", 2, "evaluations at a time")
	memory := flag.Int64("memory", 512<<20, "bytes of memory that end the worker")
	allow := flag.String("allow-builtins", "", "comma-separated builtins to allow although they are forbidden by default")
	forbid := flag.String("forbid-builtins", "", "comma-separated builtins to forbid as well")
	flag.Parse()
	if flag.NArg() != 0 || *threads < 1 || *memory < 64<<20 {
		fmt.Fprintln(os.Stderr, "opa-worker: wrong usage: it is started by Tollhouse, with at least one thread and 64 MiB of memory")
		os.Exit(exitUsage)
	}
	runtime.GOMAXPROCS(*threads + 1) // one more than evaluate, so that frames are read while all of them do
	if err := boundMemory(*memory); err != nil {
		fmt.Fprintln(os.Stderr, "opa-worker: no memory bound:", err)
		os.Exit(exitUsage)
	}
	unix.CloseOnExec(*fd)
	socket := os.NewFile(uintptr(*fd), "parent")
	running, err := openSlots(*page, *threads)
	if err != nil {
		fmt.Fprintln(os.Stderr, "opa-worker: no slots:", err)
		os.Exit(exitUsage)
	}
	worker := newWorker(socket, running, forbidden(*allow, *forbid))
	if err := worker.run(socket); err != nil && !errors.Is(err, io.EOF) {
		fmt.Fprintln(os.Stderr, "opa-worker:", err)
		os.Exit(exitSocket)
	}
}

// reachesOut are the builtins that no policy may call unless the operator allows it.
var reachesOut = []string{"http.send", "net.lookup_ip_addr", "opa.runtime"}

// forbidden returns the builtins that no policy may call: those that reach out of the process, or show what is inside it.
func forbidden(allow, forbid string) map[string]struct{} {
	names := map[string]struct{}{}
	for _, name := range append(split(forbid), reachesOut...) {
		names[name] = struct{}{}
	}
	for _, name := range split(allow) {
		delete(names, name)
	}
	return names
}

func split(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}
