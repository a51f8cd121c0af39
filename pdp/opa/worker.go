package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"time"
)

// A worker holds revisions and answers questions about them.
type worker struct {
	answers   *answers
	slots     slots
	forbidden map[string]struct{}
	jobs      chan job
	commands  chan frame

	mutex     sync.RWMutex
	revisions map[string]*revision
	queries   map[uint32]*query
}

// A job is one evaluation that waits for its turn. Its time runs from when it was read.
type job struct {
	id       uint32
	query    *query // looked up when it was read, so that a revision may be unloaded behind it
	deadline time.Time
	input    []byte
}

func newWorker(out io.Writer, slots slots, forbidden map[string]struct{}) *worker {
	return &worker{
		answers:   newAnswers(out),
		slots:     slots,
		forbidden: forbidden,
		jobs:      make(chan job, 4096),
		commands:  make(chan frame, 64),
		revisions: map[string]*revision{},
		queries:   map[uint32]*query{},
	}
}

// run reads questions until the socket ends.
func (w *worker) run(in io.Reader) error {
	for thread := range w.slots {
		go w.evaluateAll(thread)
	}
	go w.commandAll()
	reader := bufio.NewReaderSize(in, 64<<10)
	for {
		f, err := readFrame(reader)
		if err != nil {
			return err
		}
		switch f.kind {
		case kindEvaluate:
			if len(f.payload) < 8 {
				return fmt.Errorf("an evaluation of %d bytes", len(f.payload))
			}
			w.enqueue(job{
				id:       f.id,
				query:    w.lookup(binary.BigEndian.Uint32(f.payload)),
				deadline: time.Now().Add(time.Duration(binary.BigEndian.Uint32(f.payload[4:])) * time.Microsecond),
				input:    f.payload[8:],
			})
		case kindQuery:
			if err := w.name(f.payload); err != nil {
				return err
			}
		case kindCommand:
			select {
			case w.commands <- f:
			default:
				w.answers.write(f.id, kindCommand, []byte(`{"problems":[{"message":"too many commands wait"}]}`), false)
			}
		default:
			return fmt.Errorf("a frame of kind %q", f.kind)
		}
	}
}

// enqueue never waits: a reader that waited would not see the socket end, and the worker would outlive its parent.
func (w *worker) enqueue(j job) {
	select {
	case w.jobs <- j:
	default:
		kind, payload := failed("overloaded", "too many questions wait in the worker")
		w.answers.write(j.id, kind, payload, false)
	}
}

func (w *worker) evaluateAll(thread int) {
	for j := range w.jobs {
		w.slots[thread].Store(j.id + 1)
		kind, payload := w.evaluate(j)
		w.slots[thread].Store(0)
		w.answers.write(j.id, kind, payload, len(w.jobs) > 0)
	}
}

// failure is why an evaluation has no result.
type failure struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func failed(reason, message string) (byte, []byte) {
	payload, _ := json.Marshal(failure{reason, message})
	return kindFailure, payload
}

func (w *worker) evaluate(j job) (kind byte, payload []byte) {
	defer func() {
		if r := recover(); r != nil {
			kind, payload = failed("internal", fmt.Sprintf("the evaluation panicked: %v\n%s", r, debug.Stack()))
		}
	}()
	if j.query == nil {
		return failed("unavailable", "the worker does not hold that revision")
	}
	ctx, cancel := context.WithDeadline(context.Background(), j.deadline)
	defer cancel()
	return j.query.evaluate(ctx, j.input)
}

func (w *worker) lookup(number uint32) *query {
	w.mutex.RLock()
	defer w.mutex.RUnlock()
	return w.queries[number]
}

// name binds a number to an entry point of a revision that is loaded.
func (w *worker) name(payload []byte) error {
	if len(payload) < 4 {
		return fmt.Errorf("a query of %d bytes", len(payload))
	}
	var named struct {
		Revision string   `json:"revision"`
		Path     []string `json:"path"`
	}
	if err := json.Unmarshal(payload[4:], &named); err != nil {
		return err
	}
	w.mutex.Lock()
	defer w.mutex.Unlock()
	if r := w.revisions[named.Revision]; r != nil {
		w.queries[binary.BigEndian.Uint32(payload)] = &query{revision: r, path: named.Path}
	}
	return nil
}

func (w *worker) commandAll() {
	for f := range w.commands {
		w.answers.write(f.id, kindCommand, w.command(f.payload), false)
	}
}
