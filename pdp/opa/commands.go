package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	opacompile "github.com/open-policy-agent/opa/v1/compile"
	"github.com/open-policy-agent/opa/v1/format"
	opaversion "github.com/open-policy-agent/opa/v1/version"
)

// A request is a command. Op is one of those in command(); each reads the fields that it needs.
type request struct {
	Op       string            `json:"op"`
	Revision string            `json:"revision"`
	Name     string            `json:"name"` // of a revision, as part of a package's name
	Modules  map[string]string `json:"modules"`
	Data     json.RawMessage   `json:"data"`
	Strict   bool              `json:"strict"`
	Paths    [][]string        `json:"paths"`

	Schemas  map[string]json.RawMessage `json:"schemas"` // "" is that of `input`; METADATA knows "a/b" as schema.a.b
	Inputs   []json.RawMessage          `json:"inputs"`
	Run      string                     `json:"run"` // tests whose names it is found in (a regular expression)
	Coverage bool                       `json:"coverage"`
	Seconds  float64                    `json:"seconds"`
	Base     string                     `json:"base"` // a revision with the same modules, of which only the data is other
	Bundle   bundleRequest              `json:"bundle"`
}

// A reply is a command's answer. Problems is empty when all is well.
type reply struct {
	Problems  []problem         `json:"problems,omitempty"`
	Version   string            `json:"version,omitempty"`
	Forbidden []string          `json:"forbidden,omitempty"`
	Builtins  []string          `json:"builtins,omitempty"`
	Entries   []entry           `json:"entries,omitempty"`
	Rules     []string          `json:"rules,omitempty"`
	Modules   map[string]string `json:"modules,omitempty"`
	Tests     []test            `json:"tests,omitempty"`

	Coverage    []coverage        `json:"coverage,omitempty"`
	Entrypoints []string          `json:"entrypoints,omitempty"`
	Packages    map[string]string `json:"packages,omitempty"` // by module
	Measure     *measure          `json:"measure,omitempty"`
	Explanation *explanation      `json:"explanation,omitempty"`
	Bundle      *bundleReply      `json:"bundle,omitempty"`
}

// An entry is what there is to know about one entry point.
type entry struct {
	Kind      string            `json:"kind"`                // "rule", "package", "function" or "" for nothing at all
	Plan      json.RawMessage   `json:"plan,omitempty"`      // OPA's intermediate representation, for this entry point alone
	Unplanned string            `json:"unplanned,omitempty"` // why there is no plan
	Custom    []json.RawMessage `json:"custom,omitempty"`    // "custom" of the METADATA of its rules
}

func (w *worker) command(payload []byte) (answer []byte) {
	var r reply
	defer func() {
		if p := recover(); p != nil {
			r = reply{Problems: []problem{{Message: fmt.Sprintf("the command panicked: %v", p)}}}
		}
		answer, _ = json.Marshal(r)
	}()
	var q request
	if err := json.Unmarshal(payload, &q); err != nil {
		r.Problems = problems(err)
		return nil
	}
	switch q.Op {
	case "load":
		r = w.load(q)
	case "unload":
		w.unload(q.Revision)
	case "check":
		_, r.Problems = compile(q.Modules, q.Data, q.Strict, w.forbidden)
	case "plan":
		r = w.plan(q)
	case "format":
		r = reformat(q)
	case "test":
		r = w.test(q)
	case "inspect":
		r = w.inspect(q)
	case "bench":
		r = w.bench(q)
	case "explain":
		r = w.explainOne(q)
	case "bundle":
		r = readBundle(q.Bundle)
	case "sign":
		r = signBundle(q.Bundle)
	case "relocate":
		r = w.relocate(q)
	case "version":
		r = w.about()
	default:
		r.Problems = []problem{{Message: fmt.Sprintf("no command %q", q.Op)}}
	}
	return nil
}

func (w *worker) load(q request) reply {
	w.mutex.RLock()
	held := w.revisions[q.Revision] != nil
	w.mutex.RUnlock()
	if held {
		return reply{}
	}
	loaded, found := w.prepared(q)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	w.mutex.Lock()
	defer w.mutex.Unlock()
	w.revisions[q.Revision] = loaded
	return reply{}
}

func (w *worker) unload(digest string) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	old := w.revisions[digest]
	delete(w.revisions, digest)
	maps.DeleteFunc(w.queries, func(_ uint32, q *query) bool { return q.revision == old })
}

func version() string { return opaversion.Version }

func (w *worker) about() reply {
	builtins := make([]string, 0, len(ast.Builtins))
	for _, b := range ast.Builtins {
		builtins = append(builtins, b.Name)
	}
	slices.Sort(builtins)
	return reply{Version: version(), Builtins: builtins, Forbidden: slices.Sorted(maps.Keys(w.forbidden))}
}

// plan compiles each entry point to OPA's intermediate representation, alone, so that it holds what it can reach and no more.
func (w *worker) plan(q request) reply {
	compiled, found := compile(q.Modules, q.Data, q.Strict, w.forbidden)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	r := reply{Version: version(), Rules: rules(compiled.compiler)}
	for _, b := range compiled.compiler.Required.Builtins {
		r.Builtins = append(r.Builtins, b.Name)
	}
	for _, path := range q.Paths {
		r.Entries = append(r.Entries, planOne(compiled.compiler, q.Modules, path))
	}
	return r
}

func planOne(compiler *ast.Compiler, sources map[string]string, path []string) (e entry) {
	ref := ast.Ref{ast.DefaultRootDocument}
	for _, part := range path {
		ref = append(ref, ast.StringTerm(part))
	}
	if e.Kind = kindOf(compiler, ref); e.Kind != "rule" {
		return e
	}
	e.Custom = custom(compiler, ref)
	defer func() {
		if p := recover(); p != nil {
			e.Plan, e.Unplanned = nil, fmt.Sprintf("the planner panicked: %v", p)
		}
	}()
	b := &bundle.Bundle{Data: map[string]any{}}
	b.Manifest.Init()
	for _, name := range slices.Sorted(maps.Keys(sources)) {
		module, err := ast.ParseModule(name, sources[name])
		if err != nil {
			e.Unplanned = err.Error()
			return e
		}
		b.Modules = append(b.Modules, bundle.ModuleFile{URL: name, Path: name, Parsed: module, Raw: []byte(sources[name])})
	}
	point, err := ref.Ptr()
	if err != nil {
		e.Unplanned = err.Error()
		return e
	}
	planner := opacompile.New().WithBundle(b).WithTarget(opacompile.TargetPlan).WithEntrypoints(point).WithPruneUnused(true)
	if err := planner.Build(context.Background()); err != nil {
		e.Unplanned = err.Error()
		return e
	}
	e.Plan = planner.Bundle().PlanModules[0].Raw
	return e
}

// kindOf tells what a path leads to. A path below a rule is a rule's too.
func kindOf(compiler *ast.Compiler, ref ast.Ref) string {
	node := compiler.RuleTree
	for _, part := range ref {
		if node = node.Child(part.Value); node == nil {
			return ""
		}
		if len(node.Values) > 0 {
			for _, rule := range node.Values {
				if len(rule.Head.Args) > 0 {
					return "function"
				}
			}
			return "rule"
		}
	}
	for _, module := range compiler.Modules {
		if module.Package.Path.HasPrefix(ref) {
			return "package"
		}
	}
	return "rule" // made of rules whose own names go on, as in `decision.allowed := true`
}

func rules(compiler *ast.Compiler) []string {
	var names []string
	for _, module := range compiler.Modules {
		for _, rule := range module.Rules {
			if len(rule.Head.Args) == 0 {
				names = append(names, rule.Ref().GroundPrefix().String())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// custom returns the custom metadata of the rules that make up a document, of the document, and of their packages.
func custom(compiler *ast.Compiler, ref ast.Ref) []json.RawMessage {
	set := compiler.GetAnnotationSet()
	if set == nil {
		return nil
	}
	var found []json.RawMessage
	add := func(a *ast.Annotations) {
		if a != nil && len(a.Custom) > 0 {
			if text, err := json.Marshal(a.Custom); err == nil {
				found = append(found, text)
			}
		}
	}
	for _, rule := range compiler.GetRules(ref) {
		for _, a := range set.GetRuleScope(rule) {
			add(a)
		}
		add(set.GetDocumentScope(rule.Ref().GroundPrefix()))
		add(set.GetPackageScope(rule.Module.Package))
	}
	return found
}

func reformat(q request) reply {
	r := reply{Modules: map[string]string{}}
	for _, name := range slices.Sorted(maps.Keys(q.Modules)) {
		text, err := format.Source(name, []byte(q.Modules[name]))
		if err != nil {
			r.Problems = append(r.Problems, problems(err)...)
			continue
		}
		r.Modules[name] = string(text)
	}
	return r
}
