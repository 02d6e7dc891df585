package grpcplugin

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// reasonGone is the google.rpc.ErrorInfo reason that disables a subscription.
const reasonGone = "GONE"

// response is a status that the receiver sent, in HTTP's terms, without the secret, which it may say back.
func response(st *status.Status, secret string, keep int, peer string) *plugin.Response {
	r := &plugin.Response{Status: httpStatus(st), Peer: peer}
	if st.Code() == codes.OK {
		return r
	}
	r.Headers = []plugin.Header{{Name: "grpc-status", Value: strconv.Itoa(int(st.Code()))}}
	r.Body = []byte(outbound.Echo(st.Message(), []string{secret}, false))
	if len(r.Body) > keep {
		r.Body, r.Truncated = r.Body[:keep], true
	}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.RetryInfo:
			if after := d.GetRetryDelay(); after.IsValid() && after.AsDuration() > 0 {
				seconds := (after.AsDuration() + time.Second - 1) / time.Second
				r.Headers = append(r.Headers, plugin.Header{Name: "retry-after", Value: strconv.FormatInt(int64(seconds), 10)})
			}
		case *errdetails.ErrorInfo:
			if d.GetReason() == reasonGone {
				r.Status = http.StatusGone
			}
		}
	}
	return r
}

// httpStatus is the HTTP status that means the same. All but OK have the delivery repeated.
func httpStatus(st *status.Status) int {
	switch st.Code() {
	case codes.OK:
		return http.StatusOK
	case codes.Canceled:
		return 499 // the caller went away; what gRPC gateways make of it
	case codes.InvalidArgument, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists, codes.Aborted:
		return http.StatusConflict
	case codes.FailedPrecondition:
		return http.StatusPreconditionFailed
	case codes.ResourceExhausted:
		if strings.HasPrefix(st.Message(), "grpc: received message larger than max") {
			return http.StatusRequestEntityTooLarge // what gRPC servers say by themselves
		}
		return http.StatusTooManyRequests
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError // UNKNOWN, INTERNAL, DATA_LOSS, and codes that do not exist
}
