// Command authz is an ext_authz server that embeds OPA: the peer that a careful team would put beside Envoy.
//
// The policy is compiled once; each Check builds the input document of the OPA-Envoy plugin and evaluates it. No decision log, no metrics.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	status "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

type server struct {
	auth.UnimplementedAuthorizationServer
	query rego.PreparedEvalQuery
}

// Check answers allow or deny; an evaluation error is an error.
func (s *server) Check(ctx context.Context, request *auth.CheckRequest) (*auth.CheckResponse, error) {
	attributes := request.GetAttributes()
	http := attributes.GetRequest().GetHttp()
	headers := make(map[string]any, len(http.GetHeaders()))
	for name, value := range http.GetHeaders() {
		headers[name] = value
	}
	extensions := make(map[string]any, len(attributes.GetContextExtensions()))
	for name, value := range attributes.GetContextExtensions() {
		extensions[name] = value
	}
	path, _, _ := strings.Cut(http.GetPath(), "?")
	var parsed []any
	for _, part := range strings.Split(strings.TrimPrefix(path, "/"), "/") {
		parsed = append(parsed, part)
	}
	input := map[string]any{
		"attributes": map[string]any{
			"source":            map[string]any{"principal": attributes.GetSource().GetPrincipal()},
			"destination":       map[string]any{"principal": attributes.GetDestination().GetPrincipal()},
			"contextExtensions": extensions,
			"request": map[string]any{"http": map[string]any{
				"method": http.GetMethod(), "path": http.GetPath(), "host": http.GetHost(), "headers": headers, "protocol": http.GetProtocol(),
			}},
		},
		"parsed_path": parsed,
	}
	value, err := ast.InterfaceToValue(input)
	if err != nil {
		return nil, err
	}
	results, err := s.query.Eval(ctx, rego.EvalParsedInput(value))
	if err != nil {
		return nil, err
	}
	if len(results) == 1 {
		if object, ok := results[0].Expressions[0].Value.(map[string]any); ok && object["allowed"] == true {
			return &auth.CheckResponse{Status: &status.Status{Code: int32(codes.OK)}, HttpResponse: &auth.CheckResponse_OkResponse{OkResponse: &auth.OkHttpResponse{}}}, nil
		}
	}
	return &auth.CheckResponse{
		Status: &status.Status{Code: int32(codes.PermissionDenied)},
		HttpResponse: &auth.CheckResponse_DeniedResponse{DeniedResponse: &auth.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: typev3.StatusCode_Forbidden}, Headers: []*core.HeaderValueOption{},
		}},
	}, nil
}

func main() {
	listen := flag.String("listen", "127.0.0.1:9191", "address to listen at")
	policy := flag.String("policy", "", "folder of Rego and data")
	decision := flag.String("decision", "data.bench.authz.decision", "query")
	flag.Parse()
	query, err := rego.New(rego.Query(*decision), rego.Load([]string{*policy}, nil)).PrepareForEval(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	grpcServer := grpc.NewServer()
	auth.RegisterAuthorizationServer(grpcServer, &server{query: query})
	log.Fatal(grpcServer.Serve(listener))
}
