package main

import (
	"bytes"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/format"
	"github.com/open-policy-agent/opa/v1/util"
)

// place is the package in which an OPA server holds revisions that are written to it: one module for each.
const place = "tollhouse"

var plain = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// relocate writes a whole revision, its data included, as one module that stands beside others in one OPA: what is data.a.b is
// data.tollhouse.r_<name>.a.b in it. For each decision data.tollhouse.a_<name>["a.b"] is what it comes to, in a list that is empty when it is
// undefined, together with the revision: the module that decides says which one it is.
func (w *worker) relocate(q request) reply {
	compiled, found := compile(q.Modules, q.Data, q.Strict, w.forbidden)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	modules, found := resolved(q.Modules)
	if len(found) > 0 {
		return reply{Problems: found}
	}
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		if wrong := metadataIn(modules[name]); wrong != nil {
			return reply{Problems: []problem{*wrong}}
		}
	}
	data := map[string]any{}
	if len(bytes.TrimSpace(q.Data)) > 0 {
		if err := util.NewJSONDecoder(bytes.NewReader(q.Data)).Decode(&data); err != nil {
			return reply{Problems: problems(err)}
		}
	}
	m := &mover{root: "r_" + q.Name, module: &ast.Module{Package: &ast.Package{Path: ast.Ref{ast.DefaultRootDocument, ast.StringTerm(place)}}}}
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		m.move(modules[name])
	}
	if err := m.facts(nil, data); err != nil {
		return reply{Problems: problems(err)}
	}
	names := m.answers(compiled.compiler, q.Name, q.Revision)
	text, err := format.AstWithOpts(m.module, format.Opts{IgnoreLocations: true, RegoVersion: ast.RegoV1})
	if err != nil {
		return reply{Problems: problems(err)}
	}
	whole, found := compile(map[string]string{"revision.rego": string(text)}, nil, false, w.forbidden)
	if len(found) > 0 {
		return reply{Problems: append([]problem{{Message: "the revision can't be written as one module"}}, found...)}
	}
	if wrong := m.outside(whole.compiler); wrong != "" {
		return reply{Problems: []problem{{Message: wrong + " can't be written as a part of one module: let the OPA server fetch bundles"}}}
	}
	return reply{Modules: map[string]string{"": string(text)}, Rules: names}
}

// resolved parses modules and spells out every name in them, as the compiler does first of all.
func resolved(sources map[string]string) (map[string]*ast.Module, []problem) {
	parsed, found := parse(sources)
	if len(found) > 0 {
		return nil, found
	}
	copies := map[string]*ast.Module{}
	compiler := ast.NewCompiler()
	compiler.WithStageAfterID(ast.StageResolveRefs, ast.CompilerStageDefinition{
		Name:       "Spelt",
		MetricName: "spelt",
		Stage: func(c *ast.Compiler) *ast.Error {
			for name, module := range c.Modules {
				copies[name] = module.Copy()
			}
			return nil
		},
	})
	if compiler.Compile(parsed); compiler.Failed() {
		return nil, problems(compiler.Errors)
	}
	return copies, nil
}

// A mover puts rules and data into one module.
type mover struct {
	root     string
	module   *ast.Module
	packages []ast.Ref
}

func (m *mover) move(module *ast.Module) {
	m.packages = append(m.packages, module.Package.Path)
	for _, rule := range module.Rules {
		seen := map[*ast.Term]bool{}
		ast.WalkTerms(rule, func(term *ast.Term) bool {
			if ref, ok := term.Value.(ast.Ref); ok && !seen[term] {
				seen[term] = true
				term.Value = m.moved(ref)
			}
			return false
		})
		for each := rule; each != nil; each = each.Else {
			m.rename(each.Head, module.Package.Path)
			each.Module, each.Annotations = m.module, nil
		}
		m.module.Rules = append(m.module.Rules, rule)
	}
}

// moved is where what a reference leads to is now.
func (m *mover) moved(ref ast.Ref) ast.Ref {
	if len(ref) == 0 || !ref[0].Equal(ast.DefaultRootDocument) {
		return ref
	}
	at := ast.Ref{ref[0], ast.StringTerm(place), ast.StringTerm(m.root)}
	return append(at, ref[1:]...)
}

// outside is a reference that leads out of the revision's own place; empty when there is none.
func (m *mover) outside(compiler *ast.Compiler) (wrong string) {
	own := ast.Ref{ast.DefaultRootDocument, ast.StringTerm(place), ast.StringTerm(m.root)}
	for _, module := range compiler.Modules {
		for _, rule := range module.Rules {
			ast.WalkRefs(rule, func(ref ast.Ref) bool {
				if ref[0].Equal(ast.DefaultRootDocument) && !ref.HasPrefix(own) && !ref.Equal(rule.Ref()) {
					wrong = ref.String()
				}
				return wrong != ""
			})
		}
	}
	return wrong
}

// rename makes a rule of a package one of the only package that there is.
func (m *mover) rename(head *ast.Head, path ast.Ref) {
	ref := append(ast.Ref{ast.VarTerm(m.root)}, path[1:]...)
	own := head.Ref()
	ref = append(ref, ast.StringTerm(string(own[0].Value.(ast.Var))))
	head.Reference, head.Name = append(ref, own[1:]...), ""
	if head.Value != nil {
		head.Key = nil // of a partial object: it is in the reference
	}
}

// facts makes rules of data. An object in which there are packages, too, is gone into.
func (m *mover) facts(path []string, value map[string]any) error {
	for _, key := range util.KeysSorted(value) {
		at := append(slices.Clone(path), key)
		if inner, ok := value[key].(map[string]any); ok && m.above(at) {
			if err := m.facts(at, inner); err != nil {
				return err
			}
			continue
		}
		term, err := ast.InterfaceToValue(value[key])
		if err != nil {
			return err
		}
		m.rule(append([]string{m.root}, at...), ast.NewTerm(term))
	}
	return nil
}

// above tells whether a package is at or below a path.
func (m *mover) above(path []string) bool {
	return slices.ContainsFunc(m.packages, func(each ast.Ref) bool {
		if len(each) <= len(path) {
			return false
		}
		for i, part := range path {
			if each[i+1].Value.Compare(ast.String(part)) != 0 {
				return false
			}
		}
		return true
	})
}

func (m *mover) rule(path []string, value *ast.Term) {
	ref := ast.Ref{ast.VarTerm(path[0])}
	for _, part := range path[1:] {
		ref = append(ref, ast.StringTerm(part))
	}
	head := ast.RefHead(ref)
	head.Value, head.Assign = value, true
	m.module.Rules = append(m.module.Rules, &ast.Rule{Head: head, Body: ast.NewBody(ast.NewExpr(ast.BooleanTerm(true))), Module: m.module})
}

// answers makes the rules that give decisions together with their revision, and returns the decisions' names.
func (m *mover) answers(compiler *ast.Compiler, name, digest string) []string {
	paths := map[string][]string{}
	add := func(ref ast.Ref) {
		for n := 2; n <= len(ref); n++ {
			var parts []string
			for _, each := range ref[1:n] {
				text, ok := each.Value.(ast.String)
				if !ok || !plain.MatchString(string(text)) {
					return
				}
				parts = append(parts, string(text))
			}
			paths[strings.Join(parts, ".")] = parts
		}
	}
	for _, module := range compiler.Modules {
		for _, rule := range module.Rules {
			if len(rule.Head.Args) == 0 {
				add(rule.Ref().GroundPrefix())
			}
		}
	}
	names := util.KeysSorted(paths)
	for _, each := range names {
		at := ast.Ref{ast.DefaultRootDocument, ast.StringTerm(place), ast.StringTerm(m.root)}
		for _, part := range paths[each] {
			at = append(at, ast.StringTerm(part))
		}
		value := ast.VarTerm("value")
		list := ast.ArrayComprehensionTerm(value, ast.NewBody(ast.Equality.Expr(value, ast.NewTerm(at))))
		m.rule([]string{"a_" + name, each}, ast.ObjectTerm(
			ast.Item(ast.StringTerm("result"), list), ast.Item(ast.StringTerm("revision"), ast.StringTerm(digest)),
		))
	}
	return names
}

// metadataIn finds where a policy asks for its own METADATA, which is not what it was once it is written anew.
func metadataIn(module *ast.Module) *problem {
	var wrong *problem
	ast.WalkRefs(module, func(ref ast.Ref) bool {
		if name := ref.String(); wrong == nil && strings.HasPrefix(name, "rego.metadata.") {
			wrong = &problem{Message: fmt.Sprintf("%s tells of METADATA, which an OPA server is not told by REST: let it fetch bundles", name)}
			if at := ref[0].Location; at != nil {
				wrong.File, wrong.Row, wrong.Column = at.File, at.Row, at.Col
			}
		}
		return wrong != nil
	})
	return wrong
}
