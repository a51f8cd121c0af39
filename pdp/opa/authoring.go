package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/tester"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// What authors ask: is it well-typed, do its tests pass and what do they reach, how long does it take, and why does it say so.

const (
	testTime    = 10 * time.Second
	mostPrinted = 64 << 10
	mostSamples = 1 << 20
)

// A test is the outcome of one test rule, or of one case of it.
type test struct {
	Package string      `json:"package"`
	Name    string      `json:"name"`
	File    string      `json:"file"`
	Row     int         `json:"row"`
	Passed  bool        `json:"passed"`
	Skipped bool        `json:"skipped,omitempty"`
	Error   string      `json:"error,omitempty"`
	Printed string      `json:"printed,omitempty"`
	Seconds float64     `json:"seconds"`
	Failed  *condition  `json:"failed,omitempty"` // the condition that did not hold
	Because []condition `json:"because,omitempty"`
}

// coverage tells of one file which of its lines no test reached. Ranges are first and last line.
type coverage struct {
	File    string   `json:"file"`
	Covered int      `json:"covered"`
	Missed  int      `json:"missed"`
	Ranges  [][2]int `json:"ranges"`
}

// A measure is what a number of evaluations took, in microseconds.
type measure struct {
	Count       int     `json:"count"`
	Seconds     float64 `json:"seconds"`
	Mean        float64 `json:"mean"`
	Median      float64 `json:"median"`
	High        float64 `json:"high"` // 99 of 100 took no longer
	Expressions float64 `json:"expressions"`
	Undefined   int     `json:"undefined,omitempty"`
}

// withSchemas has the compiler know the type of `input`, and the schemas that METADATA may name.
func withSchemas(raw map[string]json.RawMessage) (option, []problem) {
	set := ast.NewSchemaSet()
	var found []problem
	for name, text := range raw {
		var schema any
		if err := json.Unmarshal(text, &schema); err != nil {
			found = append(found, problem{File: name, Message: "the schema is not JSON: " + err.Error()})
			continue
		}
		ref := ast.Ref{ast.SchemaRootDocument}
		for _, part := range strings.FieldsFunc(name, func(r rune) bool { return r == '/' }) {
			ref = append(ref, ast.StringTerm(part))
		}
		set.Put(ref, schema)
	}
	if len(raw) == 0 {
		return func(*ast.Compiler) {}, found
	}
	capabilities := ast.CapabilitiesForThisVersion()
	capabilities.AllowNet = []string{} // no schema is fetched from anywhere
	return func(c *ast.Compiler) {
		c.WithCapabilities(capabilities).WithSchemas(set).WithUseTypeCheckAnnotations(true)
	}, found
}

func withPrint(c *ast.Compiler) { c.WithEnablePrintStatements(true) }

// inspect type-checks modules against schemas, and tells which of their rules are there and which METADATA calls entry points.
func (w *worker) inspect(q request) reply {
	typed, found := withSchemas(q.Schemas)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	compiled, found := compile(q.Modules, q.Data, q.Strict, w.forbidden, typed)
	if len(found) > 0 {
		return reply{Problems: w.everything(q, found, typed)}
	}
	r := reply{Version: version(), Rules: rules(compiled.compiler), Packages: map[string]string{}}
	for name, module := range compiled.compiler.Modules {
		r.Packages[name] = module.Package.Path.String()
	}
	for _, each := range compiled.compiler.GetAnnotationSet().Flatten() {
		if each.Annotations.Entrypoint {
			r.Entrypoints = append(r.Entrypoints, each.Path.String())
		}
	}
	slices.Sort(r.Entrypoints)
	r.Entrypoints = slices.Compact(r.Entrypoints)
	return r
}

// everything adds to what a compiler found, which ends with the first of its stages that finds something, what the later ones would find.
func (w *worker) everything(q request, found []problem, typed option) []problem {
	modules, unread := parse(q.Modules)
	if len(unread) > 0 {
		return found
	}
	if _, more := compile(q.Modules, q.Data, q.Strict, w.forbidden, typed, func(c *ast.Compiler) {
		c.WithAllowUndefinedFunctionCalls(true)
	}); len(more) > 0 {
		found = append(found, more...)
	}
	for name, module := range modules {
		ast.WalkTerms(module, func(term *ast.Term) bool {
			call, ok := term.Value.(ast.Call)
			if ok {
				found = append(found, w.forbiddenCall(name, call[0])...)
			}
			return false
		})
		ast.WalkExprs(module, func(expr *ast.Expr) bool {
			if terms, ok := expr.Terms.([]*ast.Term); ok {
				found = append(found, w.forbiddenCall(name, terms[0])...)
			}
			return false
		})
	}
	slices.SortFunc(found, func(a, b problem) int {
		return cmp.Or(strings.Compare(a.File, b.File), a.Row-b.Row, a.Column-b.Column, strings.Compare(a.Message, b.Message))
	})
	return slices.CompactFunc(found, func(a, b problem) bool { return a.File == b.File && a.Row == b.Row && a.Message == b.Message })
}

func (w *worker) forbiddenCall(file string, operator *ast.Term) []problem {
	name := operator.String()
	if _, ok := w.forbidden[name]; !ok || operator.Location == nil {
		return nil
	}
	return []problem{{
		File: file, Row: operator.Location.Row, Column: operator.Location.Col, Code: ast.TypeErr, Message: notAllowed(name),
	}}
}

func (w *worker) test(q request) reply {
	compiled, found := compile(q.Modules, q.Data, q.Strict, w.forbidden, withPrint)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	modules, _ := parse(q.Modules)
	runner := tester.NewRunner().
		SetCompiler(ast.NewCompiler().WithUnsafeBuiltins(w.forbidden).WithEnablePrintStatements(true)).
		SetStore(compiled.store).
		SetModules(modules).
		SetTimeout(testTime).
		CapturePrintOutput(true).
		Filter(q.Run)
	reached := cover.New()
	if q.Coverage {
		runner = runner.SetCoverageQueryTracer(reached)
	}
	results, err := runner.RunTests(context.Background(), compiled.txn)
	if err != nil {
		return reply{Problems: problems(err)}
	}
	var r reply
	for result := range results {
		r.Tests = append(r.Tests, outcomes(compiled, result)...)
	}
	if q.Coverage {
		r.Coverage = covered(reached, modules)
	}
	return r
}

// outcomes turns a test's result into one for each of its cases; one without cases is one.
func outcomes(compiled *revision, result *tester.Result) []test {
	whole := test{
		Package: result.Package, Name: result.Name, Passed: result.Pass(), Skipped: result.Skip,
		Seconds: result.Duration.Seconds(), Printed: cut(string(result.Output), mostPrinted),
	}
	if result.Location != nil {
		whole.File, whole.Row = result.Location.File, result.Location.Row
	}
	if result.Error != nil {
		whole.Error = result.Error.Error()
		if topdown.IsCancel(result.Error) {
			whole.Error = fmt.Sprintf("it took longer than %v", testTime)
		}
		return []test{whole}
	}
	var cases []test
	for name, sub := range result.SubResults.Iter {
		one := whole
		one.Name, one.Passed = whole.Name+"/"+strings.Join(name, "/"), !sub.Fail
		if len(sub.SubResults) == 0 {
			cases = append(cases, one)
		}
	}
	if len(cases) > 0 {
		slices.SortFunc(cases, func(a, b test) int { return strings.Compare(a.Name, b.Name) })
		return cases
	}
	if result.Fail && result.Location != nil {
		whole.Failed, whole.Because = whyFailed(compiled, result)
	}
	return []test{whole}
}

// whyFailed evaluates a test again, watching it.
func whyFailed(compiled *revision, result *tester.Result) (*condition, []condition) {
	for name, module := range compiled.compiler.Modules {
		if name != result.Location.File {
			continue
		}
		for _, rule := range module.Rules {
			if rule.Loc() == nil || rule.Loc().Row != result.Location.Row {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), testTime)
			defer cancel()
			told := explain(ctx, compiled, rule.Ref().GroundPrefix(), nil)
			for i, step := range told.Steps {
				if step.File == result.Location.File && step.Row == result.Location.Row && step.Failed != nil {
					return step.Failed, because(told.Steps[i+1:], step.Depth)
				}
			}
		}
	}
	return nil, nil
}

// because returns the failed conditions of the rules that a failed one asked.
func because(steps []step, depth int) []condition {
	var found []condition
	for _, s := range steps {
		if s.Depth <= depth || len(found) == 8 {
			break
		}
		if s.Failed != nil {
			found = append(found, *s.Failed)
		}
	}
	return found
}

func covered(reached *cover.Cover, modules map[string]*ast.Module) []coverage {
	found := []coverage{}
	for name, file := range reached.Report(modules).Files {
		if strings.HasSuffix(name, "_test.rego") {
			continue
		}
		one := coverage{File: name, Covered: file.CoveredLines, Missed: file.NotCoveredLines, Ranges: [][2]int{}}
		for _, r := range file.NotCovered {
			if last := len(one.Ranges) - 1; last >= 0 && r.Start.Row <= one.Ranges[last][1]+1 {
				one.Ranges[last][1] = max(one.Ranges[last][1], r.End.Row)
				continue
			}
			one.Ranges = append(one.Ranges, [2]int{r.Start.Row, max(r.Start.Row, r.End.Row)})
		}
		found = append(found, one)
	}
	slices.SortFunc(found, func(a, b coverage) int { return strings.Compare(a.File, b.File) })
	return found
}

// bench evaluates an entry point again and again, over all inputs in turn, as a question is: its input is read, its answer written.
func (w *worker) bench(q request) reply {
	compiled, found := compile(q.Modules, q.Data, q.Strict, w.forbidden)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	if len(q.Paths) != 1 || len(q.Inputs) == 0 {
		return reply{Problems: []problem{{Message: "bench takes one path and some inputs"}}}
	}
	asked := &query{revision: compiled, path: q.Paths[0]}
	m := measure{}
	var samples []float64
	for _, input := range q.Inputs {
		counter := &expressionCounter{}
		ctx, cancel := context.WithTimeout(context.Background(), testTime)
		kind, payload := asked.evaluate(ctx, input, rego.EvalQueryTracer(counter))
		cancel()
		if kind == kindFailure {
			var f failure
			_ = json.Unmarshal(payload, &f)
			if f.Reason == "timeout" {
				f.Message = fmt.Sprintf("an evaluation took longer than %v", testTime)
			}
			return reply{Problems: []problem{{Message: f.Message, Code: f.Reason}}}
		}
		m.Expressions += float64(counter.count) / float64(len(q.Inputs))
	}
	began := time.Now()
	end := began.Add(time.Duration(q.Seconds * float64(time.Second)))
	for i := 0; ; i++ {
		before := time.Now()
		if i > 0 && (before.After(end) || i == mostSamples) {
			break
		}
		kind, _ := asked.evaluate(context.Background(), q.Inputs[i%len(q.Inputs)])
		samples = append(samples, float64(time.Since(before).Nanoseconds())/1e3)
		if kind == kindUndefined {
			m.Undefined++
		}
	}
	m.Seconds = time.Since(began).Seconds()
	m.Count = len(samples)
	m.Mean = m.Seconds * 1e6 / float64(m.Count)
	slices.Sort(samples)
	m.Median, m.High = samples[m.Count/2], samples[min(m.Count-1, m.Count*99/100)]
	return reply{Measure: &m}
}

type expressionCounter struct{ count int }

func (*expressionCounter) Enabled() bool               { return true }
func (*expressionCounter) Config() topdown.TraceConfig { return topdown.TraceConfig{} }
func (c *expressionCounter) TraceEvent(e topdown.Event) {
	if e.Op == topdown.EvalOp {
		c.count++
	}
}

func (w *worker) explainOne(q request) reply {
	compiled, found := compile(q.Modules, q.Data, q.Strict, w.forbidden, withPrint)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	if len(q.Paths) != 1 || len(q.Inputs) != 1 {
		return reply{Problems: []problem{{Message: "explain takes one path and one input"}}}
	}
	input, err := ast.ValueFromReader(bytes.NewReader(q.Inputs[0]))
	if err != nil {
		return reply{Problems: []problem{{File: "input", Message: "the input is not JSON: " + err.Error()}}}
	}
	ref := ast.Ref{ast.DefaultRootDocument}
	for _, part := range q.Paths[0] {
		ref = append(ref, ast.StringTerm(part))
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(q.Seconds*float64(time.Second)))
	defer cancel()
	told := explain(ctx, compiled, ref, input)
	return reply{Explanation: &told}
}

func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "..."
}
