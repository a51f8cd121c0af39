package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"
)

// The protocol. Both ways, a frame is
//
//	uint32  length of what follows it (big endian, as all numbers)
//	uint32  id: an answer carries the id of its question
//	byte    kind
//	...     payload
//
// Questions:
//
//	'E'  evaluate: uint32 query, uint32 microseconds allowed, input as JSON
//	'Q'  name a query: uint32 query, JSON {"revision", "path"}; not answered
//	'C'  a command: JSON, see commands.go
//
// Answers, in whatever order they become ready:
//
//	'R'  the result, as JSON
//	'U'  undefined
//	'F'  the evaluation failed: JSON {"reason", "message"}
//	'C'  a command's answer: JSON
const (
	kindEvaluate  = 'E'
	kindQuery     = 'Q'
	kindCommand   = 'C'
	kindResult    = 'R'
	kindUndefined = 'U'
	kindFailure   = 'F'

	headLength = 9
	maxFrame   = 256 << 20
	// An answer waits this long at most for others to share its system call.
	flushDelay = 300 * time.Microsecond
	flushSize  = 64 << 10
)

type frame struct {
	id      uint32
	kind    byte
	payload []byte
}

func readFrame(r *bufio.Reader) (frame, error) {
	var head [headLength]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	length := binary.BigEndian.Uint32(head[:4])
	if length < headLength-4 || length > maxFrame {
		return frame{}, fmt.Errorf("a frame of %d bytes", length)
	}
	f := frame{id: binary.BigEndian.Uint32(head[4:8]), kind: head[8], payload: make([]byte, length-headLength+4)}
	_, err := io.ReadFull(r, f.payload)
	return f, err
}

// answers writes frames to the socket, several in one system call where they come together.
type answers struct {
	mutex sync.Mutex
	out   io.Writer
	ready []byte
	timer *time.Timer
	armed bool
	err   error
}

func newAnswers(out io.Writer) *answers {
	a := &answers{out: out}
	a.timer = time.AfterFunc(time.Hour, a.flush)
	a.timer.Stop()
	return a
}

// write sends an answer: now, or with more to come, when the next one is sent or a moment has passed.
func (a *answers) write(id uint32, kind byte, payload []byte, more bool) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.ready = binary.BigEndian.AppendUint32(a.ready, uint32(len(payload)+headLength-4))
	a.ready = binary.BigEndian.AppendUint32(a.ready, id)
	a.ready = append(a.ready, kind)
	a.ready = append(a.ready, payload...)
	switch {
	case !more || len(a.ready) >= flushSize:
		a.send()
	case !a.armed:
		a.armed = true
		a.timer.Reset(flushDelay)
	}
}

func (a *answers) flush() {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.armed = false
	a.send()
}

func (a *answers) send() {
	if len(a.ready) > 0 && a.err == nil {
		_, a.err = a.out.Write(a.ready)
	}
	if cap(a.ready) > 1<<20 {
		a.ready = nil
	}
	a.ready = a.ready[:0]
}
