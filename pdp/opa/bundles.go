package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/util"
)

// maxBundle bounds what is in a bundle, in bytes: its modules and data go through one frame.
const maxBundle = 192 << 20

// A bundleRequest names a bundle to be read (File), or files to be signed (Files).
type bundleRequest struct {
	File      string                       `json:"file"`
	Verify    bool                         `json:"verify"` // refuse one that is not signed by one of Keys
	Skip      bool                         `json:"skip"`   // do not look at signatures: the caller knows its digest
	Keys      map[string]*bundle.KeyConfig `json:"keys"`
	KeyID     string                       `json:"keyId"`
	Scope     string                       `json:"scope"`
	Files     map[string]string            `json:"files"`
	Key       string                       `json:"key"`
	Algorithm string                       `json:"algorithm"`
}

// A bundleReply is what is in a bundle, or the token that signs one.
type bundleReply struct {
	Revision string            `json:"revision,omitempty"`
	Modules  map[string]string `json:"modules,omitempty"`
	Data     string            `json:"data,omitempty"` // JSON as a text: a reader may be less exact about numbers
	Metadata json.RawMessage   `json:"metadata,omitempty"`
	Token    string            `json:"token,omitempty"`
}

// readBundle opens an OPA bundle with OPA's own reader, which checks its signature, its roots and its form.
func readBundle(q bundleRequest) reply {
	file, err := os.Open(q.File)
	if err != nil {
		return reply{Problems: problems(err)}
	}
	defer func() { _ = file.Close() }()
	reader := bundle.NewCustomReader(bundle.NewTarballLoaderWithBaseURL(file, "")).
		WithSizeLimitBytes(maxBundle).
		WithSkipBundleVerification(q.Skip)
	if q.Verify {
		reader = reader.WithBundleVerificationConfig(bundle.NewVerificationConfig(q.Keys, q.KeyID, q.Scope, nil))
	}
	found, err := reader.Read()
	if err != nil {
		return reply{Problems: problems(err)}
	}
	if message := unusable(&found); message != "" {
		return reply{Problems: []problem{{Message: message}}}
	}
	r := bundleReply{Revision: found.Manifest.Revision, Modules: map[string]string{}}
	for _, module := range found.Modules {
		name := strings.TrimPrefix(path.Clean("/"+module.RelativePath), "/")
		if _, twice := r.Modules[name]; twice {
			return reply{Problems: []problem{{File: name, Message: "the file is in the bundle twice"}}}
		}
		r.Modules[name] = string(module.Raw)
	}
	data, err := json.Marshal(found.Data)
	if err != nil {
		return reply{Problems: problems(err)}
	}
	r.Data = string(data)
	if len(found.Manifest.Metadata) > 0 {
		if r.Metadata, err = json.Marshal(found.Manifest.Metadata); err != nil {
			return reply{Problems: problems(err)}
		}
	}
	return reply{Bundle: &r}
}

// unusable says why a good bundle can't be used here; empty if it can.
func unusable(b *bundle.Bundle) string {
	if b.Type() == bundle.DeltaBundleType {
		return "it is a delta bundle (patch.json): only snapshots are taken, of which each is a whole revision"
	}
	if len(b.WasmModules) > 0 {
		return "it has policy compiled to WebAssembly: build it for Rego (opa build --target rego)"
	}
	if b.RegoVersion(ast.RegoV1) == ast.RegoV0 {
		return "its manifest says rego_version 0: write it for Rego v1 (opa fmt --v0-v1)"
	}
	for _, module := range b.Modules {
		if version, err := b.RegoVersionForFile(module.RelativePath, ast.RegoV1); err == nil && version == ast.RegoV0 {
			return module.RelativePath + " is Rego v0 by the manifest: write it for Rego v1 (opa fmt --v0-v1)"
		}
	}
	return ""
}

// signBundle makes the token of .signatures.json for the files of a bundle.
func signBundle(q bundleRequest) reply {
	hasher, err := bundle.NewSignatureHasher(bundle.SHA256)
	if err != nil {
		return reply{Problems: problems(err)}
	}
	var files []bundle.FileInfo
	for _, name := range slices.Sorted(maps.Keys(q.Files)) {
		var value any = []byte(q.Files[name])
		if bundle.IsStructuredDoc(name) {
			if err := util.Unmarshal([]byte(q.Files[name]), &value); err != nil {
				return reply{Problems: []problem{{File: name, Message: err.Error()}}}
			}
		}
		digest, err := hasher.HashFile(value)
		if err != nil {
			return reply{Problems: problems(err)}
		}
		files = append(files, bundle.NewFile(name, hex.EncodeToString(digest), string(bundle.SHA256)))
	}
	claims := ""
	if q.Scope != "" { // OPA takes claims from a file only
		if claims, err = scopeFile(q.Scope); err != nil {
			return reply{Problems: problems(err)}
		}
		defer func() { _ = os.Remove(claims) }()
	}
	token, err := bundle.GenerateSignedToken(files, bundle.NewSigningConfig(q.Key, q.Algorithm, claims), q.KeyID)
	if err != nil {
		return reply{Problems: []problem{{Message: fmt.Sprintf("it can't be signed with this key by %s: %v", q.Algorithm, err)}}}
	}
	return reply{Bundle: &bundleReply{Token: token}}
}

func scopeFile(scope string) (string, error) {
	file, err := os.CreateTemp("", "tollhouse-claims-")
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	return file.Name(), json.NewEncoder(file).Encode(map[string]string{"scope": scope})
}

// prepared compiles a revision. When one with the same modules is held (Base), it takes over what that one compiled.
func (w *worker) prepared(q request) (*revision, []problem) {
	if q.Base == "" {
		return compile(q.Modules, q.Data, q.Strict, w.forbidden)
	}
	w.mutex.RLock()
	base := w.revisions[q.Base]
	w.mutex.RUnlock()
	if base == nil {
		return nil, []problem{{Code: "no_base", Message: q.Base + " is not held"}}
	}
	return base.withData(q.Data)
}

// withData is a revision with the same modules and other data.
func (r *revision) withData(data json.RawMessage) (*revision, []problem) {
	base := map[string]any{}
	if len(bytes.TrimSpace(data)) > 0 {
		if err := util.NewJSONDecoder(bytes.NewReader(data)).Decode(&base); err != nil {
			return nil, []problem{{File: "data", Message: "the data is not a JSON object: " + err.Error()}}
		}
	}
	made, found := newRevision(r.compiler, base)
	if len(found) > 0 {
		return nil, found
	}
	if clashes := ast.CheckPathConflicts(r.compiler, made.occupied()); len(clashes) > 0 {
		return nil, problems(clashes)
	}
	made.imports = r.imports
	return made, nil
}
