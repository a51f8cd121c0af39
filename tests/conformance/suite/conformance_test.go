// Runs the Gateway API conformance suite against the API and the gateways that `python -m tests.conformance` has started.
package conformance

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/client-go/kubernetes"
	scheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	v1 "sigs.k8s.io/gateway-api/apis/v1"
	v1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"
	v1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"
	xv1alpha1 "sigs.k8s.io/gateway-api/apisx/v1alpha1"
	suitev1 "sigs.k8s.io/gateway-api/conformance"
	report "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/config"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
	"sigs.k8s.io/yaml"
)

func words(name string) []string {
	return strings.FieldsFunc(os.Getenv(name), func(r rune) bool { return r == ',' || r == ' ' })
}

// names are the features that are claimed: those listed, or all that are not about meshes of sidecars.
func names(texts []string) (found []features.FeatureName) {
	if len(texts) == 1 && texts[0] == "all" {
		for feature := range features.AllFeatures {
			if !strings.HasPrefix(string(feature.Name), "Mesh") {
				found = append(found, feature.Name)
			}
		}
		return found
	}
	for _, text := range texts {
		found = append(found, features.FeatureName(text))
	}
	return found
}

func addresses(texts []string) (found []v1.GatewaySpecAddress) {
	kind := v1.IPAddressType
	for _, text := range texts {
		found = append(found, v1.GatewaySpecAddress{Type: &kind, Value: text})
	}
	return found
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	where := &rest.Config{Host: os.Getenv("KUBE_API"), QPS: -1, ContentConfig: rest.ContentConfig{ContentType: "application/json"}}
	kinds := scheme.Scheme
	for _, add := range []func() error{
		func() error { return v1.Install(kinds) },
		func() error { return v1alpha2.Install(kinds) },
		func() error { return v1beta1.Install(kinds) },
		func() error { return xv1alpha1.Install(kinds) },
		func() error { return apiextensions.AddToScheme(kinds) },
	} {
		must(t, add())
	}
	options := client.Options{Scheme: kinds}
	asked, err := client.New(where, options)
	must(t, err)
	set, err := kubernetes.NewForConfig(where)
	must(t, err)
	times := config.DefaultTimeoutConfig()
	times.TestIsolation = 0
	if text := os.Getenv("CONFORMANCE_PATIENCE"); text != "" {
		patience, err := time.ParseDuration(text)
		must(t, err)
		times.MaxTimeToConsistency = patience
		times.GatewayMustHaveAddress = patience
		times.GatewayMustHaveCondition = patience
		times.GatewayListenersMustHaveConditions = patience
		times.GatewayStatusMustHaveListeners = patience
		times.ListenerSetMustHaveCondition = patience
		times.RouteMustHaveParents = patience
		times.HTTPRouteMustHaveCondition = patience
		times.HTTPRouteMustNotHaveParents = patience
		times.TLSRouteMustHaveCondition = patience
		times.LatestObservedGenerationSet = patience
		times.NamespacesMustBeReady = 2 * time.Minute
		times.DefaultPollInterval = 200 * time.Millisecond
		times.RequiredConsecutiveSuccesses = 2
	}
	profiles := []suite.ConformanceProfileName{}
	for _, name := range words("CONFORMANCE_PROFILES") {
		profiles = append(profiles, suite.ConformanceProfileName(name))
	}
	cases := append([]suite.ConformanceTest{}, tests.ConformanceTests...)
	if wanted := words("CONFORMANCE_TESTS"); len(wanted) > 0 {
		chosen := map[string]bool{}
		for _, name := range wanted {
			chosen[name] = true
		}
		cases = nil
		for _, test := range tests.ConformanceTests {
			if chosen[test.ShortName] {
				cases = append(cases, test)
			}
		}
	}
	for at := range cases {
		run, name := cases[at].Test, cases[at].ShortName
		cases[at].Test = func(t *testing.T, s *suite.ConformanceTestSuite) {
			t.Cleanup(func() {
				if result := map[bool]string{true: "failed", false: "passed"}[t.Failed()]; !t.Skipped() {
					fmt.Fprintf(os.Stderr, "%s %s\n", result, name)
				}
			})
			run(t, s)
		}
	}
	made, err := suite.NewConformanceTestSuite(suite.ConformanceOptions{
		Client: asked, ClientOptions: options, Clientset: set, RestConfig: where,
		ManifestFS: []fs.FS{&suitev1.Manifests},
		ConfigurableOptions: suite.ConfigurableOptions{
			GatewayClassName:         os.Getenv("GATEWAY_CLASS"),
			Debug:                    os.Getenv("CONFORMANCE_DEBUG") != "",
			CleanupTestResources:     true,
			CleanupBaseResources:     false,
			SupportedFeatures:        names(words("CONFORMANCE_FEATURES")),
			SkipTests:                words("CONFORMANCE_SKIP"),
			TimeoutConfig:            times,
			AllowCRDsMismatch:        true,
			ConformanceProfiles:      profiles,
			UsableNetworkAddresses:   addresses(words("USABLE_ADDRESSES")),
			UnusableNetworkAddresses: addresses(words("UNUSABLE_ADDRESSES")),
			Implementation:           report.Implementation{Organization: "tollhouse", Project: "tollhouse", Version: "dev"},
		},
	})
	must(t, err)
	made.Setup(t, cases)
	must(t, made.Run(t, cases))
	found, err := made.Report()
	must(t, err)
	text, err := yaml.Marshal(found)
	must(t, err)
	must(t, os.WriteFile(os.Getenv("CONFORMANCE_REPORT"), text, 0o644))
	lines, _ := json.Marshal(found.ProfileReports)
	t.Logf("%s", lines)
}
