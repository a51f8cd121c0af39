package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// Why an expression did not hold, in words.

const mostOperands = 4

// An operand is a part of an expression whose value is not plain to see in its text.
type operand struct {
	text  string
	value *ast.Term // nil when it is undefined
	lost  string    // how far an undefined reference leads
	loop  bool      // it is what a reference with a variable in it goes through
}

// condition tells of an expression that failed at this moment.
func (w *watcher) condition(e topdown.Event, q *watched, expr *ast.Expr) *condition {
	c := &condition{}
	if loc := expr.Loc(); loc != nil {
		c.File, c.Row = loc.File, loc.Row
		c.Text = cut(strings.Join(strings.Fields(string(loc.Text)), " "), mostText)
	}
	if c.Text == "" {
		c.Text = cut(expr.String(), mostText)
	}
	if q.inner != nil && expr.IsEvery() {
		c.Said = fmt.Sprintf("%s is false: %s", c.Text, q.inner.Said)
		return c
	}
	operands := w.operands(e, q, expr)
	_, bare := expr.Terms.(*ast.Term) // the expression is nothing but a value
	var values, missing, loops []string
	for _, o := range operands {
		switch {
		case o.value == nil:
			missing = append(missing, o.lost)
		case o.loop:
			loops = append(loops, fmt.Sprintf("%s is %s", o.text, show(o.value)))
		case len(operands) == 1 && (bare || strings.Contains(c.Text, o.text)):
			values = append(values, "it is "+show(o.value))
		default:
			values = append(values, fmt.Sprintf("%s is %s", o.text, show(o.value)))
		}
	}
	switch {
	case len(missing) == 1 && !expr.Negated && (bare || strings.HasPrefix(missing[0], c.Text+" ")):
		c.Said = missing[0]
	case len(missing) > 0 && !expr.Negated:
		c.Said = fmt.Sprintf("%s is undefined: %s", c.Text, strings.Join(missing, ", "))
	case len(loops) > 0:
		c.Said = fmt.Sprintf("%s holds for nothing there (%s)", c.Text, strings.Join(append(loops, values...), ", "))
	case bare && len(values) == 1 && !expr.Negated:
		c.Said = c.Text + " is " + strings.TrimPrefix(values[0], "it is ")
	case len(values) > 0:
		c.Said = fmt.Sprintf("%s is false (%s)", c.Text, strings.Join(values, ", "))
	default:
		c.Said = c.Text + " is false or undefined"
	}
	return c
}

// operands finds the references and variables that an expression is about.
func (w *watcher) operands(e topdown.Event, q *watched, expr *ast.Expr) []operand {
	var found []operand
	seen := map[string]bool{}
	add := func(o operand) {
		if !seen[o.text] && len(found) < mostOperands {
			seen[o.text] = true
			found = append(found, o)
		}
	}
	look := func(term *ast.Term) bool {
		switch v := term.Value.(type) {
		case ast.Var:
			if value := e.Plug(term); !isVar(value) {
				add(operand{text: w.nameOf(q, v), value: value})
			}
			return true
		case ast.Ref:
			if o, ok := w.reference(e, q, expr, v); ok {
				add(o)
			}
			return true
		case *ast.ArrayComprehension, *ast.SetComprehension, *ast.ObjectComprehension, ast.Call:
			return true
		}
		return false
	}
	switch terms := expr.Terms.(type) {
	case *ast.Term:
		ast.NewGenericVisitor(visit(look)).Walk(terms)
	case []*ast.Term:
		for _, term := range terms[1:] {
			ast.NewGenericVisitor(visit(look)).Walk(term)
		}
	}
	return found
}

func visit(look func(*ast.Term) bool) func(any) bool {
	return func(x any) bool {
		term, ok := x.(*ast.Term)
		return ok && look(term)
	}
}

// reference evaluates a reference as it is meant in expr. It is not told of what can't be known: of data that a `with` further out changes.
func (w *watcher) reference(e topdown.Event, q *watched, expr *ast.Expr, ref ast.Ref) (operand, bool) {
	o := operand{text: w.refText(q, ref)}
	plugged, ok := e.Plug(ast.NewTerm(ref)).Value.(ast.Ref)
	if !ok {
		return o, false
	}
	whole := len(plugged)
	for i, part := range plugged[1:] {
		if !ast.IsConstant(part.Value) { // what it iterates over
			whole = i + 1
			break
		}
	}
	asked := plugged[:whole]
	if whole < len(plugged) {
		o.text, o.loop = w.refText(q, ref[:whole]), true
	}
	if !ref[0].Equal(ast.DefaultRootDocument) && !ref[0].Equal(ast.InputRootDocument) {
		value, err := asked[0].Value.Find(asked[1:])
		if isVar(asked[0]) {
			return o, false
		}
		if err != nil {
			o.lost = fmt.Sprintf("%s is not there (%s is %s)", o.text, w.refText(q, ref[:1]), show(asked[0]))
			return o, true
		}
		o.value = ast.NewTerm(value)
		return o, true
	}
	if q.overlaid && ref[0].Equal(ast.DefaultRootDocument) {
		return o, false
	}
	if o.value = w.value(e, expr, asked); o.value != nil {
		return o, true
	}
	o.lost = o.text + " is not there"
	for length := whole - 1; length > 0 && ref[0].Equal(ast.InputRootDocument); length-- {
		value := w.value(e, expr, asked[:length])
		if value == nil {
			continue
		}
		o.lost += fmt.Sprintf(" (%s %s)", asked[:length], holds(value))
		break
	}
	return o, true
}

// holds says what an object has instead.
func holds(value *ast.Term) string {
	object, ok := value.Value.(ast.Object)
	if !ok {
		return "is " + show(value)
	}
	var keys []string
	for _, key := range object.Keys() {
		keys = append(keys, strings.Trim(key.String(), `"`))
	}
	slices.Sort(keys)
	if len(keys) == 0 {
		return "is empty"
	}
	return "has " + cut(strings.Join(keys, ", "), mostText)
}

// value evaluates a ground reference with the input that there is at this moment, and with the `with` of the expression that it is in.
func (w *watcher) value(e topdown.Event, in *ast.Expr, ref ast.Ref) *ast.Term {
	expr := ast.Equality.Expr(ast.VarTerm("x"), ast.NewTerm(ref))
	for _, with := range in.With {
		plugged := e.Plug(with.Value)
		if !ast.IsConstant(plugged.Value) {
			return nil
		}
		expr = expr.IncludeWith(with.Target, plugged)
	}
	prepared, err := rego.New(
		rego.ParsedQuery(ast.NewBody(expr)),
		rego.Compiler(w.on.compiler), rego.Store(w.on.store), rego.Transaction(w.on.txn),
	).PrepareForEval(w.ctx)
	if err != nil {
		return nil
	}
	options := []rego.EvalOption{rego.EvalTransaction(w.on.txn)}
	if input := e.Input(); input != nil {
		options = append(options, rego.EvalParsedInput(input.Value))
	}
	results, err := prepared.Eval(w.ctx, options...)
	if err != nil || len(results) == 0 {
		return nil
	}
	value, err := ast.InterfaceToValue(results[0].Bindings["x"])
	if err != nil {
		return nil
	}
	return ast.NewTerm(value)
}

// nameOf is what the author called a variable; of one that OPA made, the text that it stands for.
func (w *watcher) nameOf(q *watched, v ast.Var) string {
	if name, ok := w.on.compiler.RewrittenVars[v]; ok {
		return string(name)
	}
	if text := w.standsFor(q, v); text != "" {
		return w.imported(q, w.unrewritten(q, text))
	}
	return "it"
}

// standsFor is the text whose value OPA put into a variable of its own.
func (w *watcher) standsFor(q *watched, v ast.Var) string {
	if q.rule == nil {
		return ""
	}
	for _, expr := range q.rule.Body {
		terms, ok := expr.Terms.([]*ast.Term)
		if !ok || len(terms) < 3 {
			continue
		}
		if expr.IsEquality() {
			if terms[1].Value.Compare(v) == 0 {
				return terms[2].String()
			}
			continue
		}
		if terms[len(terms)-1].Value.Compare(v) == 0 && w.arity(terms[0]) == len(terms)-2 {
			arguments := make([]string, 0, len(terms)-2)
			for _, term := range terms[1 : len(terms)-1] {
				arguments = append(arguments, term.String())
			}
			return terms[0].String() + "(" + strings.Join(arguments, ", ") + ")"
		}
	}
	return ""
}

func (w *watcher) arity(operator *ast.Term) int {
	ref, ok := operator.Value.(ast.Ref)
	if !ok {
		return -1
	}
	if builtin, ok := ast.BuiltinMap[ref.String()]; ok {
		return builtin.Decl.Arity()
	}
	for _, rule := range w.on.compiler.GetRulesExact(ref) {
		return len(rule.Head.Args)
	}
	return -1
}

var made = regexp.MustCompile(`__local\d+__`)

// unrewritten puts the author's names, and what they stand for, into a text that has OPA's variables.
func (w *watcher) unrewritten(q *watched, text string) string {
	for range 4 { // what they stand for may have such variables in it
		text = made.ReplaceAllStringFunc(text, func(name string) string {
			if theirs, ok := w.on.compiler.RewrittenVars[ast.Var(name)]; ok {
				return string(theirs)
			}
			if stands := w.standsFor(q, ast.Var(name)); stands != "" {
				return stands
			}
			return name
		})
	}
	if q.rule != nil && q.rule.Module != nil {
		text = strings.ReplaceAll(text, q.rule.Module.Package.Path.String()+".", "")
	}
	return cut(made.ReplaceAllString(text, "_"), mostText)
}

// imported puts the names that a file imports into a text, unless the author wrote the whole path.
func (w *watcher) imported(q *watched, text string) string {
	if q.rule == nil || q.rule.Loc() == nil || q.now != nil && q.now.Loc() != nil && strings.Contains(string(q.now.Loc().Text), text) {
		return text
	}
	for _, each := range w.on.imports[q.rule.Loc().File] {
		text = strings.ReplaceAll(text, each[0]+".", each[1]+".")
		text = strings.ReplaceAll(text, each[0]+"[", each[1]+"[")
	}
	return text
}

func (w *watcher) refText(q *watched, ref ast.Ref) string {
	if head, ok := ref[0].Value.(ast.Var); ok && !ref[0].Equal(ast.DefaultRootDocument) && !ref[0].Equal(ast.InputRootDocument) {
		name := w.nameOf(q, head)
		rest := ast.Ref{ast.VarTerm("x")}
		rest = append(rest, ref[1:]...)
		return name + strings.TrimPrefix(w.unrewritten(q, rest.String()), "x")
	}
	return w.imported(q, w.unrewritten(q, ref.String()))
}
