package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
)

const (
	mostSteps = 400
	mostCalls = 5 // of one function, with different arguments
	mostItems = 5
	mostText  = 160
)

// An explanation is an evaluation's result and what its rules did on the way, in the order in which they were asked.
type explanation struct {
	Kind        string          `json:"kind"` // as in engine.py: result, undefined or error
	Value       json.RawMessage `json:"value,omitempty"`
	Reason      string          `json:"reason,omitempty"`
	Message     string          `json:"message,omitempty"`
	Steps       []step          `json:"steps"`
	More        bool            `json:"more,omitempty"` // there were more than are told
	Printed     string          `json:"printed,omitempty"`
	Errors      []string        `json:"errors,omitempty"` // of builtins, which make what they are in undefined
	Expressions int             `json:"expressions"`
}

// A step is what became of one definition of a rule.
type step struct {
	Rule   string     `json:"rule"`
	Kind   string     `json:"kind"` // rule, else, default or function
	File   string     `json:"file"`
	Row    int        `json:"row"`
	Depth  int        `json:"depth"`
	Held   bool       `json:"held"`
	Values []string   `json:"values,omitempty"`
	Failed *condition `json:"failed,omitempty"` // the first condition that did not hold, of the try that came furthest
	Tries  int        `json:"tries"`            // how often that condition was looked at
}

// A condition is one expression that did not hold.
type condition struct {
	File string `json:"file"`
	Row  int    `json:"row"`
	Text string `json:"text"`
	Said string `json:"said"` // the text, and in words what became of it
}

// A watched is one query of the evaluation: a rule's body, or a body inside an expression.
type watched struct {
	parent   *watched
	step     int // index of the rule's step; -1 for what has none of its own
	depth    int
	rule     *ast.Rule
	now      *ast.Expr  // what is being evaluated
	overlaid bool       // whether a `with` around it changes data or functions
	furthest int        // index of the furthest expression that failed
	inner    *condition // what failed inside `now`

	arguments []string // what `now` calls a function with
}

type watcher struct {
	ctx     context.Context
	on      *revision
	told    *explanation
	queries map[uint64]*watched
	steps   map[string]int
	calls   map[*ast.Rule]int
	elses   map[*ast.Rule]bool
}

func (*watcher) Enabled() bool               { return true }
func (*watcher) Config() topdown.TraceConfig { return topdown.TraceConfig{} }

// explain evaluates ref and watches it: without the rule index, which passes rules over unseen, and without leaving loops early.
func explain(ctx context.Context, on *revision, ref ast.Ref, input ast.Value) explanation {
	told := explanation{Steps: []step{}}
	w := &watcher{
		ctx: ctx, on: on, told: &told, queries: map[uint64]*watched{}, steps: map[string]int{},
		calls: map[*ast.Rule]int{}, elses: map[*ast.Rule]bool{},
	}
	for _, module := range on.compiler.Modules {
		for _, rule := range module.Rules {
			for each := rule.Else; each != nil; each = each.Else {
				w.elses[each] = true
			}
		}
	}
	var printed bytes.Buffer
	var wrong []topdown.Error
	prepared, err := rego.New(
		rego.ParsedQuery(ast.NewBody(ast.NewExpr(ast.NewTerm(ref)))),
		rego.Compiler(on.compiler), rego.Store(on.store), rego.Transaction(on.txn),
		rego.BuiltinErrorList(&wrong), rego.PrintHook(topdown.NewPrintHook(&printed)),
	).PrepareForEval(ctx)
	if err != nil {
		told.Kind, told.Reason, told.Message = "error", "eval", err.Error()
		return told
	}
	options := []rego.EvalOption{
		rego.EvalTransaction(on.txn), rego.EvalQueryTracer(w), rego.EvalRuleIndexing(false), rego.EvalEarlyExit(false),
	}
	if input != nil {
		options = append(options, rego.EvalParsedInput(input))
	}
	results, err := prepared.Eval(ctx, options...)
	switch {
	case err != nil:
		told.Kind, told.Reason, told.Message = "error", reason(ctx, err), err.Error()
	case len(results) == 0:
		told.Kind = "undefined"
	default:
		told.Kind = "result"
		if told.Value, err = json.Marshal(results[0].Expressions[0].Value); err != nil || len(told.Value) > maxResult {
			told.Kind, told.Reason, told.Message, told.Value = "error", "eval", "the result is not JSON, or too large", nil
		}
	}
	for i := range told.Steps {
		if told.Steps[i].Held {
			told.Steps[i].Failed = nil
		}
	}
	for _, e := range wrong {
		text := e.Error()
		if len(told.Errors) < 20 && !slices.Contains(told.Errors, text) {
			told.Errors = append(told.Errors, text)
		}
	}
	told.Printed = cut(printed.String(), mostPrinted)
	return told
}

// TraceEvent takes what happens as it happens: bindings are only right then.
func (w *watcher) TraceEvent(e topdown.Event) {
	switch e.Op {
	case topdown.EnterOp:
		w.enter(e)
	case topdown.EvalOp:
		w.told.Expressions++
		if q := w.queries[e.QueryID]; q != nil {
			if expr := asExpr(e.Node); expr != nil {
				if expr != q.now {
					q.now, q.inner = expr, nil
				}
				q.arguments = arguments(e, expr)
			}
		}
	case topdown.FailOp:
		if q, expr := w.queries[e.QueryID], asExpr(e.Node); q != nil && expr != nil {
			w.fail(e, q, expr)
		}
	case topdown.ExitOp:
		if q, rule := w.queries[e.QueryID], asRule(e.Node); q != nil && rule != nil && q.step >= 0 {
			s := &w.told.Steps[q.step]
			s.Held = true
			if text := valueText(e, rule); text != "" && len(s.Values) < mostItems && !slices.Contains(s.Values, text) {
				s.Values = append(s.Values, text)
			}
		}
	}
}

func asExpr(node ast.Node) *ast.Expr {
	expr, _ := node.(*ast.Expr)
	return expr
}

func asRule(node ast.Node) *ast.Rule {
	rule, _ := node.(*ast.Rule)
	return rule
}

func (w *watcher) enter(e topdown.Event) {
	parent := w.queries[e.ParentID]
	q := &watched{parent: parent, step: -1, furthest: -1}
	if parent != nil {
		q.depth = parent.depth
		q.overlaid = parent.overlaid || parent.now != nil && slices.ContainsFunc(parent.now.With, func(with *ast.With) bool {
			target, ok := with.Target.Value.(ast.Ref)
			return !ok || !target.HasPrefix(ast.InputRootRef)
		})
	}
	w.queries[e.QueryID] = q
	rule := asRule(e.Node)
	if rule == nil {
		return
	}
	q.rule = rule
	q.depth++
	var passed []string
	if parent != nil {
		passed = parent.arguments
	}
	s := step{Rule: ruleText(rule, passed), Kind: "rule", Depth: q.depth - 1}
	if loc := rule.Loc(); loc != nil {
		s.File, s.Row = loc.File, loc.Row
	}
	switch {
	case rule.Default:
		s.Kind = "default"
	case w.elses[rule]:
		s.Kind = "else"
	case len(rule.Head.Args) > 0:
		s.Kind = "function"
	}
	key := fmt.Sprintf("%p %s", rule, s.Rule)
	if known, ok := w.steps[key]; ok {
		q.step = known
		return
	}
	if w.calls[rule]++; w.calls[rule] > mostCalls || len(w.told.Steps) == mostSteps {
		w.told.More = true
		return
	}
	w.steps[key] = len(w.told.Steps)
	q.step = len(w.told.Steps)
	w.told.Steps = append(w.told.Steps, s)
}

func (w *watcher) fail(e topdown.Event, q *watched, expr *ast.Expr) {
	if q.rule == nil { // inside an expression: it may be what the expression fails by
		// An `every` has a query for what it goes through, and in it one for its body.
		if every := ancestor(q, 2); every != nil && every.inner == nil && every.now != nil && every.now.IsEvery() {
			q.rule = every.rule // whose names it uses
			every.inner = w.condition(e, q, expr)
			q.rule = nil
		}
		return
	}
	if q.step < 0 {
		return
	}
	s := &w.told.Steps[q.step]
	at := slices.Index(q.rule.Body, expr)
	switch {
	case s.Held || at < q.furthest:
	case at == q.furthest && s.Failed != nil:
		s.Tries++
	case s.Failed == nil || at > q.furthest:
		q.furthest = at
		s.Tries = 1
		s.Failed = w.condition(e, q, expr)
	}
}

func ancestor(q *watched, levels int) *watched {
	for ; q != nil && levels > 0; levels-- {
		q = q.parent
	}
	return q
}

// arguments tells what a call of a policy's own function passes to it.
func arguments(e topdown.Event, expr *ast.Expr) []string {
	if !expr.IsCall() {
		return nil
	}
	if operator, ok := expr.Terms.([]*ast.Term)[0].Value.(ast.Ref); !ok || !operator.HasPrefix(ast.DefaultRootRef) {
		return nil
	}
	var found []string
	for _, term := range expr.Operands() {
		found = append(found, show(e.Plug(term)))
	}
	return found
}

// ruleText is a rule's name, with what it is called with, or what it puts into a set.
func ruleText(rule *ast.Rule, passed []string) string {
	name := rule.Head.Ref().String()
	if len(rule.Head.Args) > 0 {
		if len(passed) > len(rule.Head.Args) {
			passed = passed[:len(rule.Head.Args)]
		}
		return name + "(" + strings.Join(passed, ", ") + ")"
	}
	if rule.Head.DocKind() == ast.PartialSetDoc && rule.Head.Key != nil && ast.IsConstant(rule.Head.Key.Value) {
		return name + " contains " + show(rule.Head.Key)
	}
	return name
}

func valueText(e topdown.Event, rule *ast.Rule) string {
	term := rule.Head.Value
	if rule.Head.DocKind() == ast.PartialSetDoc {
		term = rule.Head.Key
	}
	if term == nil {
		return ""
	}
	return show(e.Plug(term))
}

func isVar(term *ast.Term) bool {
	_, ok := term.Value.(ast.Var)
	return ok
}

func show(term *ast.Term) string {
	return cut(strings.Join(strings.Fields(term.String()), " "), mostText)
}
