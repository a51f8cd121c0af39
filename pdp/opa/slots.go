package main

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// slots tells the parent which evaluation each thread is in, in memory that both see: it is the only thing that still
// speaks after a policy has ended the process. A slot holds the question's id plus one; zero is idle.
type slots []atomic.Uint32

// openSlots maps the parent's page. Without one (fd below zero) the slots are the worker's own, and tell nobody.
func openSlots(fd, threads int) (slots, error) {
	if fd < 0 {
		return make(slots, threads), nil
	}
	page, err := unix.Mmap(fd, 0, 4*threads, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fd)
	return unsafe.Slice((*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(page))), threads), nil
}
