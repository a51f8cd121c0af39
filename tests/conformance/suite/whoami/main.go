// A name server that answers each question about an address with one record: what the suite asks UDP routes for.
package main

import (
	"log"
	"net"
	"os"

	"github.com/miekg/dns"
)

func main() {
	answer := func(w dns.ResponseWriter, asked *dns.Msg) {
		said := new(dns.Msg).SetReply(asked)
		for _, question := range asked.Question {
			header := dns.RR_Header{Name: question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 0}
			if question.Qtype == dns.TypeA {
				said.Answer = append(said.Answer, &dns.A{Hdr: header, A: net.IPv4(127, 0, 0, 1)})
			}
		}
		_ = w.WriteMsg(said)
	}
	server := &dns.Server{Addr: net.JoinHostPort(os.Getenv("POD_IP"), "53"), Net: "udp", Handler: dns.HandlerFunc(answer)}
	log.Fatal(server.ListenAndServe())
}
