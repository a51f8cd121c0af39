package main

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"log"
	"sync"
	"sync/atomic"
	"time"
)

// pipe carries messages, each of which is to come back: a stream of gRPC, a WebSocket.
type pipe interface {
	send(message []byte) error
	receive() ([]byte, error)
	end() error
	close()
}

func openPipe(kind, address, host string, config *tls.Config) pipe {
	open := openSocket
	if kind == "stream" {
		open = openStream
	}
	made, err := open(address, host, config)
	if err != nil {
		log.Fatalf("%s at %s: %v", kind, address, err)
	}
	return made
}

// message is the one with a number: no two of a run are alike.
func message(number uint64, size int) []byte {
	made := make([]byte, size)
	if size < 8 {
		log.Fatal("a message has 8 bytes or more")
	}
	copy(made, pattern(size))
	binary.BigEndian.PutUint64(made, number)
	return made
}

// flying is a message that has not come back.
type flying struct {
	number uint64
	sent   time.Time
}

// through sends messages through one pipe, `window` of them at a time on their way, until none is left to send or the pipe breaks.
func through(p pipe, size, window int, left *atomic.Int64, found *findings) (broken bool) {
	under := make(chan flying, window)
	slots := make(chan struct{}, window)
	stop := make(chan struct{})
	var group sync.WaitGroup
	var failed error
	group.Add(1)
	go func() {
		defer group.Done()
		for each := range under {
			got, err := p.receive()
			if err != nil {
				failed = err
				close(stop)
				p.close()
				found.failed(err)
				for range under {
					found.failed(err)
				}
				return
			}
			if expected := message(each.number, size); !bytes.Equal(got, expected) {
				found.failed(wrong("message %d of %d bytes came back as another one, of %d", each.number, size, len(got)))
			} else {
				found.right(time.Since(each.sent))
			}
			<-slots
		}
	}()
	var number uint64
sending:
	for left.Add(-1) >= 0 {
		select {
		case slots <- struct{}{}:
		case <-stop:
			left.Add(1)
			break sending
		}
		number++
		under <- flying{number, time.Now()}
		if err := p.send(message(number, size)); err != nil {
			p.close()
			break
		}
	}
	close(under)
	group.Wait()
	return failed != nil
}
