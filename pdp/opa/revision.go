package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/agnivade/levenshtein"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/types"
	"github.com/open-policy-agent/opa/v1/util"
)

// notAllowed says why a builtin is refused.
func notAllowed(name string) string {
	if slices.Contains(reachesOut, name) {
		return name + " is not allowed in a policy here: it reaches out of the evaluation (the operator may allow it)"
	}
	return name + " is not allowed in a policy here: the operator forbids it"
}

// maxResult bounds one answer, in bytes of JSON.
const maxResult = 16 << 20

// A revision is one whole version of policy, compiled. It never changes.
type revision struct {
	compiler *ast.Compiler
	store    storage.Store
	txn      storage.Transaction
	imports  map[string][][2]string // by module: a path, and what the author calls it there
}

// A query is one entry point of a revision, prepared when it is first asked.
type query struct {
	revision *revision
	path     []string
	once     sync.Once
	prepared rego.PreparedEvalQuery
	err      error
}

// problem is one error in a module, with where it is.
type problem struct {
	File    string `json:"file"`
	Row     int    `json:"row"`
	Column  int    `json:"column"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

// problems spells an error out: all that a compiler found, in the order of the files.
func problems(err error) []problem {
	if err == nil {
		return nil
	}
	var many ast.Errors
	if errors.As(err, &many) {
		found := make([]problem, 0, len(many))
		for _, e := range many {
			found = append(found, one(e))
		}
		return found
	}
	var single *ast.Error
	if errors.As(err, &single) {
		return []problem{one(single)}
	}
	return []problem{{Message: err.Error()}}
}

func one(e *ast.Error) problem {
	p := problem{Code: e.Code, Message: e.Message}
	if e.Location != nil {
		p.File, p.Row, p.Column = e.Location.File, e.Location.Row, e.Location.Col
	}
	if detail, ok := e.Details.(*ast.RefErrInvalidDetail); ok {
		p.Message = noSuchPlace(detail)
	} else if e.Details != nil {
		p.Message = strings.Join(append([]string{p.Message}, e.Details.Lines()...), "\n")
	}
	if name, ok := strings.CutPrefix(p.Message, "unsafe built-in function calls in expression: "); ok {
		p.Message = notAllowed(name)
	}
	return p
}

// noSuchPlace says of a reference that leads nowhere how far it leads, and what it may have meant.
func noSuchPlace(detail *ast.RefErrInvalidDetail) string {
	whole, before := detail.Ref.String(), detail.Ref[:detail.Pos].String()
	if len(detail.OneOf) == 0 {
		if detail.Want == nil {
			return fmt.Sprintf("%s leads nowhere: there is nothing in %s", whole, before)
		}
		return fmt.Sprintf("%s leads nowhere: %s takes %s", whole, before, types.Sprint(detail.Want))
	}
	wanted := ""
	if text, ok := detail.Ref[detail.Pos].Value.(ast.String); ok {
		wanted = string(text)
	}
	var known []string
	best, distance := "", len(wanted)/3+2
	for _, value := range detail.OneOf {
		text, ok := value.(ast.String)
		if !ok {
			continue
		}
		known = append(known, string(text))
		if d := levenshtein.ComputeDistance(strings.ToLower(wanted), strings.ToLower(string(text))); d < distance {
			best, distance = string(text), d
		}
	}
	slices.Sort(known)
	said := fmt.Sprintf("%s leads nowhere: %s has no %s", whole, before, detail.Ref[detail.Pos])
	if best != "" {
		return said + "; did you mean " + append(slices.Clone(detail.Ref[:detail.Pos]), ast.StringTerm(best)).String() + "?"
	}
	more := ""
	if len(known) > 12 {
		known, more = known[:12], ", ..."
	}
	return said + "; it has " + strings.Join(known, ", ") + more
}

// parse reads all modules, and tells of every one that can't be read.
func parse(sources map[string]string) (map[string]*ast.Module, []problem) {
	modules := make(map[string]*ast.Module, len(sources))
	var found []problem
	for _, name := range slices.Sorted(maps.Keys(sources)) {
		module, err := ast.ParseModuleWithOpts(name, sources[name], ast.ParserOptions{ProcessAnnotation: true})
		if err != nil {
			found = append(found, problems(err)...)
			continue
		}
		if module == nil {
			found = append(found, problem{File: name, Row: 1, Column: 1, Code: ast.ParseErr, Message: "the module is empty"})
			continue
		}
		modules[name] = module
	}
	return modules, found
}

// An option changes how modules are compiled.
type option func(*ast.Compiler)

// compile checks and compiles modules together with their data.
func compile(
	sources map[string]string, data json.RawMessage, strict bool, forbidden map[string]struct{}, options ...option,
) (*revision, []problem) {
	modules, found := parse(sources)
	if len(found) > 0 {
		return nil, found
	}
	base := map[string]any{}
	if len(bytes.TrimSpace(data)) > 0 {
		if err := util.NewJSONDecoder(bytes.NewReader(data)).Decode(&base); err != nil {
			return nil, []problem{{File: "data", Message: "the data is not a JSON object: " + err.Error()}}
		}
	}
	made, found := newRevision(ast.NewCompiler(), base)
	if len(found) > 0 {
		return nil, found
	}
	made.compiler.
		SetErrorLimit(0).
		WithStrict(strict).
		WithUnsafeBuiltins(forbidden).
		WithPathConflictsCheck(made.occupied())
	for _, apply := range options {
		apply(made.compiler)
	}
	if made.compiler.Compile(modules); made.compiler.Failed() {
		return nil, problems(made.compiler.Errors)
	}
	made.imports = imports(modules)
	return made, nil
}

// newRevision puts data beside a compiler.
func newRevision(compiler *ast.Compiler, data map[string]any) (*revision, []problem) {
	store := inmem.NewFromObjectWithOpts(data, inmem.OptRoundTripOnWrite(false), inmem.OptReturnASTValuesOnRead(true))
	txn, err := store.NewTransaction(context.Background())
	if err != nil {
		return nil, problems(err)
	}
	return &revision{compiler: compiler, store: store, txn: txn}, nil
}

func imports(modules map[string]*ast.Module) map[string][][2]string {
	found := map[string][][2]string{}
	for name, module := range modules {
		for _, each := range module.Imports {
			if path, ok := each.Path.Value.(ast.Ref); ok && len(path) > 1 && path[0].Value.Compare(ast.Var("rego")) != 0 {
				found[name] = append(found[name], [2]string{path.String(), string(each.Name())})
			}
		}
	}
	return found
}

// occupied tells whether there is data at a path, where no rule may be then.
func (r *revision) occupied() func([]string) (bool, error) {
	return storage.NonEmpty(context.Background(), r.store, r.txn)
}

func (q *query) prepare() {
	ref := ast.Ref{ast.DefaultRootDocument}
	for _, part := range q.path {
		ref = append(ref, ast.StringTerm(part))
	}
	q.prepared, q.err = rego.New(
		rego.ParsedQuery(ast.NewBody(ast.NewExpr(ast.NewTerm(ref)))),
		rego.Compiler(q.revision.compiler),
		rego.Store(q.revision.store),
		rego.Transaction(q.revision.txn),
	).PrepareForEval(context.Background())
}

// evaluate answers one question: its kind and payload.
func (q *query) evaluate(ctx context.Context, input []byte, options ...rego.EvalOption) (byte, []byte) {
	if ctx.Err() != nil {
		return failed("timeout", "the question's time was over before its turn came")
	}
	if q.once.Do(q.prepare); q.err != nil {
		return failed("eval", q.err.Error())
	}
	value, err := ast.ValueFromReader(bytes.NewReader(input))
	if err != nil {
		return failed("input", "the input is not JSON: "+err.Error())
	}
	options = append(options, rego.EvalParsedInput(value), rego.EvalTransaction(q.revision.txn))
	results, err := q.prepared.Eval(ctx, options...)
	if err != nil {
		return failed(reason(ctx, err), err.Error())
	}
	if len(results) == 0 || len(results[0].Expressions) == 0 {
		return kindUndefined, nil
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(results[0].Expressions[0].Value); err != nil {
		return failed("eval", fmt.Sprintf("the result is not JSON: %v", err))
	}
	if out.Len() > maxResult {
		return failed("eval", fmt.Sprintf("the result has %d bytes, at most %d are allowed", out.Len(), maxResult))
	}
	return kindResult, out.Bytes()[:out.Len()-1]
}

func reason(ctx context.Context, err error) string {
	switch {
	case ctx.Err() != nil || topdown.IsCancel(err):
		return "timeout"
	case err != nil && strings.Contains(err.Error(), topdown.ConflictErr):
		return "conflict"
	default:
		return "eval"
	}
}
