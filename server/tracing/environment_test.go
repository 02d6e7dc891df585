package tracing

import (
	"fmt"
	"strings"
	"testing"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// Nothing is traced unless the environment asks for it, and what it says that makes no sense is refused by the variable's name,
// without what may be secret.
func TestEnvironment(t *testing.T) {
	for _, tt := range []struct {
		env    string
		on     bool
		refuse string
	}{
		{"", false, ""},
		{"OTEL_TRACES_SAMPLER=always_on", false, ""},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318", true, ""},
		{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=https://h/x OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc", true, ""},
		{"OTEL_TRACES_EXPORTER=otlp", true, ""},
		{"OTEL_TRACES_EXPORTER=none OTEL_EXPORTER_OTLP_ENDPOINT=http://h", false, ""},
		{"OTEL_SDK_DISABLED=TRUE OTEL_EXPORTER_OTLP_ENDPOINT=http://h", false, ""},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_TRACES_SAMPLER=parentbased_traceidratio OTEL_TRACES_SAMPLER_ARG=0.01", true, ""},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_HEADERS=a=geheim,b=x%20y", true, ""},
		{"OTEL_TRACES_EXPORTER=zipkin", false, "OTEL_TRACES_EXPORTER"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_TRACES_SAMPLER=sometimes", false, "OTEL_TRACES_SAMPLER:"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_TRACES_SAMPLER=traceidratio OTEL_TRACES_SAMPLER_ARG=2", false, "OTEL_TRACES_SAMPLER_ARG"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_TRACES_SAMPLER=traceidratio OTEL_TRACES_SAMPLER_ARG=NaN", false, "OTEL_TRACES_SAMPLER_ARG"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_PROTOCOL=http/json", false, "OTEL_EXPORTER_OTLP_PROTOCOL"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT=geheim@h:4317", false, "OTEL_EXPORTER_OTLP_ENDPOINT"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_TRACES_HEADERS=a=b,geheim", false, "OTEL_EXPORTER_OTLP_TRACES_HEADERS: header 2"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_HEADERS=a=geheim%zz", false, "OTEL_EXPORTER_OTLP_HEADERS: header 1"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_TIMEOUT=10s", false, "OTEL_EXPORTER_OTLP_TIMEOUT"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_TRACES_HEADERS=a=b OTEL_EXPORTER_OTLP_HEADERS=Authorization:geheim", false, "OTEL_EXPORTER_OTLP_HEADERS: header 1"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_CERTIFICATE=/does/not/exist.pem", false, "OTEL_EXPORTER_OTLP_CERTIFICATE"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_COMPRESSION=zstd", false, "OTEL_EXPORTER_OTLP_COMPRESSION"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_COMPRESSION=gzip OTEL_EXPORTER_OTLP_INSECURE=true", true, ""},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_BSP_MAX_QUEUE_SIZE=-1", false, "OTEL_BSP_MAX_QUEUE_SIZE"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_BSP_SCHEDULE_DELAY=0", false, "OTEL_BSP_SCHEDULE_DELAY"},
		{"OTEL_TRACES_EXPORTER=otlp OTEL_BSP_MAX_EXPORT_BATCH_SIZE=many", false, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"},
	} {
		t.Run(tt.env, func(t *testing.T) {
			for pair := range strings.FieldsSeq(tt.env) {
				name, value, _ := strings.Cut(pair, "=")
				t.Setenv(name, value)
			}
			tracer, err := Open(t.Context(), Options{Version: "test"})
			switch {
			case tt.refuse == "" && err != nil, tt.refuse != "" && (err == nil || !strings.Contains(err.Error(), tt.refuse)):
				t.Errorf("got the error %v, want one of %q", err, tt.refuse)
			case err != nil && strings.Contains(err.Error(), "geheim"):
				t.Errorf("the error tells a secret: %v", err)
			case (tracer != nil) != tt.on:
				t.Errorf("traced: %t, want %t", tracer != nil, tt.on)
			}
			_ = tracer.Close(t.Context())
		})
	}
}

// What no publisher has decided about is sampled by its part, however small.
func TestSmallPartsAreSampled(t *testing.T) {
	const ids = 200_000
	for _, part := range []float64{0.001, 0.01, 0.5} {
		sampler, err := samplerOf("traceidratio", fmt.Sprint(part))
		if err != nil {
			t.Fatal(err)
		}
		sampled := 0.0
		for range ids {
			if sampler.ShouldSample(sdktrace.SamplingParameters{TraceID: newTraceID()}).Decision == sdktrace.RecordAndSample {
				sampled++
			}
		}
		if want := part * ids; sampled < want*0.5 || sampled > want*1.5 {
			t.Errorf("%v of %d sampled at %v, want about %v", sampled, ids, part, want)
		}
	}
}
