package api

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	alphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// edgeMetrics counts calls. Methods that do not exist share one label, so that callers cannot make series.
type edgeMetrics struct {
	calls   *prometheus.CounterVec
	methods map[string]methodMetrics
	other   methodMetrics
}

// methodMetrics holds what a successful call touches, looked up once.
type methodMetrics struct {
	name string
	// changes is set for methods that an operator wants to see in the log by default.
	changes bool
	ok      prometheus.Counter
	seconds prometheus.Observer
}

func newEdgeMetrics(r prometheus.Registerer) edgeMetrics {
	m := edgeMetrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "grapnel_api_calls_total",
			Help: "Calls that ended, by method, code and reason.",
		}, []string{"method", "code", "reason"}),
		methods: map[string]methodMetrics{},
	}
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "grapnel_api_call_seconds",
		Help:    "Time that calls took.",
		Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 30},
	}, []string{"method"})
	if r != nil {
		r.MustRegister(m.calls, seconds)
	}
	series := func(name string, changes bool) methodMetrics {
		return methodMetrics{name, changes, m.calls.WithLabelValues(name, "OK", ""), seconds.WithLabelValues(name)}
	}
	m.other = series("unknown", false)
	for method, desc := range allMethods() {
		m.methods[method] = series(method[1:], checkedByInterceptor(method) && !readOnly(desc))
	}
	return m
}

// of returns the series of a method.
func (m *edgeMetrics) of(method string) methodMetrics {
	if series, ok := m.methods[method]; ok {
		return series
	}
	return m.other
}

func (m *edgeMetrics) observe(series methodMetrics, refusal *Error, took time.Duration) {
	series.seconds.Observe(took.Seconds())
	if refusal == nil {
		series.ok.Inc()
		return
	}
	m.calls.WithLabelValues(series.name, refusal.codeName(), refusal.Reason()).Inc()
}

// allMethods yields "/service/method" of everything that is served.
func allMethods() func(yield func(string, protoreflect.MethodDescriptor) bool) {
	return func(yield func(string, protoreflect.MethodDescriptor) bool) {
		for _, file := range servedFiles() {
			for i := range file.Services().Len() {
				service := file.Services().Get(i)
				for j := range service.Methods().Len() {
					method := service.Methods().Get(j)
					if !yield("/"+string(service.FullName())+"/"+string(method.Name()), method) {
						return
					}
				}
			}
		}
	}
}

func servedFiles() []protoreflect.FileDescriptor {
	return []protoreflect.FileDescriptor{
		grapnelv1.File_grapnel_v1_admin_proto,
		grapnelv1.File_grapnel_v1_delivery_proto,
		grapnelv1.File_grapnel_v1_event_proto,
		grapnelv1.File_grapnel_v1_namespace_proto,
		grapnelv1.File_grapnel_v1_plugin_proto,
		grapnelv1.File_grapnel_v1_secret_proto,
		grapnelv1.File_grapnel_v1_subscription_proto,
		healthpb.File_grpc_health_v1_health_proto,
		reflectionpb.File_grpc_reflection_v1_reflection_proto,
		alphapb.File_grpc_reflection_v1alpha_reflection_proto,
	}
}

// readOnly reports what the method's proto says.
func readOnly(method protoreflect.MethodDescriptor) bool {
	options, _ := method.Options().(*descriptorpb.MethodOptions)
	return options.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS
}
