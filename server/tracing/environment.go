package tracing

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// environment is what the OTEL_* variables say. The exporters read theirs themselves; those that they would put up with
// although they make no sense are looked at before.
type environment struct {
	on      bool
	grpc    bool
	sampler sdktrace.Sampler
	// secrets are what the variables hold that no log may show.
	secrets []string
}

func readEnvironment() (*environment, error) {
	e := &environment{}
	endpoint, _ := ofTraces("ENDPOINT")
	switch exporter := os.Getenv("OTEL_TRACES_EXPORTER"); {
	case strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true"), exporter == "none", exporter == "" && endpoint == "":
		return e, nil
	case exporter != "" && exporter != "otlp":
		return nil, fmt.Errorf("OTEL_TRACES_EXPORTER: %q given; otlp and none are known", exporter)
	}
	e.on = true
	protocol, name := ofTraces("PROTOCOL")
	switch protocol {
	case "", "http/protobuf":
	case "grpc":
		e.grpc = true
	default:
		return nil, fmt.Errorf("%s: %q given; grpc and http/protobuf are known", name, protocol)
	}
	var err error
	e.sampler, err = samplerOf(os.Getenv("OTEL_TRACES_SAMPLER"), os.Getenv("OTEL_TRACES_SAMPLER_ARG"))
	return e, errors.Join(err, e.endpoint(), e.headers(), exporterFault(), processorFault())
}

// ofTraces is a variable of the exporter that is for all signals, or that for traces alone, and the name of the one that counts.
func ofTraces(rest string) (value, name string) {
	const prefix = "OTEL_EXPORTER_OTLP_"
	if name = prefix + "TRACES_" + rest; os.Getenv(name) == "" {
		name = prefix + rest
	}
	return os.Getenv(name), name
}

// bothOf visits the two variables, where they are set: the SDK reads the one that does not count, too, and writes what it
// cannot read to standard error.
func bothOf(rest string, visit func(name, value string) error) error {
	var faults []error
	for _, prefix := range [...]string{"OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"} {
		if value := os.Getenv(prefix + rest); value != "" {
			faults = append(faults, visit(prefix+rest, value))
		}
	}
	return errors.Join(faults...)
}

// endpoint refuses what is no URL, without saying what it is: it may hold a password, and so may its path.
func (e *environment) endpoint() error {
	return bothOf("ENDPOINT", func(name, text string) error {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return fmt.Errorf("%s: it is no URL such as http://127.0.0.1:4318", name)
		}
		if u.User != nil {
			password, _ := u.User.Password()
			e.secrets = append(e.secrets, u.User.Username(), password)
		}
		e.secrets = append(e.secrets, u.RawQuery)
		for _, values := range u.Query() {
			e.secrets = append(e.secrets, values...)
		}
		for segment := range strings.SplitSeq(u.Path, "/") {
			if len(segment) >= longSegment {
				e.secrets = append(e.secrets, segment)
			}
		}
		return nil
	})
}

// longSegment is how long a part of a path is that may be a token.
const longSegment = 8

// headers refuses what the exporters would leave out after they had written it to the log.
func (e *environment) headers() error {
	return bothOf("HEADERS", func(name, text string) error {
		for i, header := range strings.Split(text, ",") {
			key, value, ok := strings.Cut(header, "=")
			plain, err := url.PathUnescape(value)
			if !ok || err != nil || !isToken(strings.TrimSpace(key)) {
				return fmt.Errorf("%s: header %d cannot be read; want NAME=VALUE, with commas between and other characters percent-encoded", name, i+1)
			}
			e.secrets = append(e.secrets, strings.TrimSpace(value), strings.TrimSpace(plain))
			if _, token, ok := strings.Cut(strings.TrimSpace(plain), " "); ok { // behind Bearer, or Basic
				e.secrets = append(e.secrets, token)
			}
		}
		return nil
	})
}

func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r)
	})
}

// exporterFault is what else the exporters would put up with: a certificate that is not there is not to become the system's
// roots.
func exporterFault() error {
	oneOf := func(rest, known string) error {
		return bothOf(rest, func(name, text string) error {
			if !slices.Contains(strings.Fields(known), strings.ToLower(text)) {
				return fmt.Errorf("%s: %q given; known are: %s", name, text, known)
			}
			return nil
		})
	}
	file := func(rest string) error {
		return bothOf(rest, func(name, path string) error {
			if text, err := os.ReadFile(path); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			} else if block, _ := pem.Decode(text); block == nil {
				return fmt.Errorf("%s: %s is no PEM file", name, path)
			}
			return nil
		})
	}
	return errors.Join(
		bothOf("TIMEOUT", func(name, text string) error { return whole(name, text, "milliseconds", math.MaxInt32) }),
		oneOf("COMPRESSION", "gzip none"), oneOf("INSECURE", "true false"),
		file("CERTIFICATE"), file("CLIENT_CERTIFICATE"), file("CLIENT_KEY"),
	)
}

// processorFault is what of OTEL_BSP_* the SDK would crash of, or leave out.
func processorFault() error {
	const mostSpans = 1 << 20
	var faults []error
	for _, v := range [...]struct {
		name, unit string
		most       int
	}{
		{"SCHEDULE_DELAY", "milliseconds", math.MaxInt32}, {"EXPORT_TIMEOUT", "milliseconds", math.MaxInt32},
		{"MAX_QUEUE_SIZE", "spans", mostSpans}, {"MAX_EXPORT_BATCH_SIZE", "spans", mostSpans},
	} {
		name := "OTEL_BSP_" + v.name
		if text := os.Getenv(name); text != "" {
			faults = append(faults, whole(name, text, v.unit, v.most))
		}
	}
	return errors.Join(faults...)
}

func whole(name, text, unit string, most int) error {
	if n, err := strconv.Atoi(text); err != nil || n < 1 || n > most {
		return fmt.Errorf("%s: %q given; want %s, from 1 to %d", name, text, unit, most)
	}
	return nil
}

// samplerOf is the sampler by its standard name; all that no parent has decided about is sampled by default.
func samplerOf(name, arg string) (sdktrace.Sampler, error) {
	ratio := 1.0
	if strings.HasSuffix(name, "traceidratio") && arg != "" {
		var err error
		if ratio, err = strconv.ParseFloat(arg, 64); err != nil || !(ratio >= 0 && ratio <= 1) {
			return nil, fmt.Errorf("OTEL_TRACES_SAMPLER_ARG: %q given; want a part of 1, such as 0.01", arg)
		}
	}
	switch name {
	case "", "parentbased_always_on":
		return sdktrace.ParentBased(sdktrace.AlwaysSample()), nil
	case "parentbased_always_off":
		return sdktrace.ParentBased(sdktrace.NeverSample()), nil
	case "parentbased_traceidratio":
		return sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio)), nil
	case "always_on":
		return sdktrace.AlwaysSample(), nil
	case "always_off":
		return sdktrace.NeverSample(), nil
	case "traceidratio":
		return sdktrace.TraceIDRatioBased(ratio), nil
	}
	return nil, fmt.Errorf("OTEL_TRACES_SAMPLER: %q given; always_on, always_off, traceidratio and the same with parentbased_ before it are known", name)
}

// exporter connects to nobody yet.
func (e *environment) exporter(ctx context.Context) (sdktrace.SpanExporter, error) {
	if e.grpc {
		return otlptracegrpc.New(ctx)
	}
	return otlptracehttp.New(ctx)
}
