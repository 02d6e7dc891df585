package client

import (
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
)

// namespaces begins every full name but that of a plugin. Short IDs have no slash and cannot be mistaken for
// one; an event's ID may have slashes, and is taken for a full name only if it is one of its own namespace.
const namespaces = "namespaces/"

// namespaceName is the full name of a namespace given by either.
func namespaceName(namespace string) string {
	return namespaces + strings.TrimPrefix(namespace, namespaces)
}

// resourceName is the full name of a resource of a collection, given by its ID or full name.
func resourceName(namespace, collection, id string) (string, error) {
	prefix := namespaceName(namespace) + "/" + collection + "/"
	switch {
	case id == "":
		return "", badName(collection, id, prefix)
	case strings.HasPrefix(id, prefix):
		return id, nil
	case collection == "events", collection == "eventTypes": // whose IDs are their publishers' and may look like anything
		return prefix + EscapeID(id), nil
	case !strings.HasPrefix(id, namespaces):
		return prefix + id, nil
	}
	return "", badName(collection, id, prefix)
}

// EscapeID returns an event's ID as it stands in the event's name: %XX for each byte that is not an ASCII letter, digit or
// one of . _ ~ -. Methods that take an ID do this themselves.
func EscapeID(id string) string {
	var b strings.Builder
	for i := range len(id) {
		c := id[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._~-", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// shortID is the ID of a resource that is to be made, given by either.
func shortID(namespace, collection, id string) (string, error) {
	prefix := namespaceName(namespace) + "/" + collection + "/"
	if strings.HasPrefix(id, namespaces) && !strings.HasPrefix(id, prefix) {
		return "", badName(collection, id, prefix)
	}
	return strings.TrimPrefix(id, prefix), nil
}

func badName(collection, id, prefix string) *Error {
	e := newError(codes.InvalidArgument, fmt.Sprintf("%q is no name in %s: want an ID, or %sID", id, strings.TrimSuffix(prefix, "/"+collection+"/")+"'s "+collection, prefix))
	e.Reason = string(ErrInvalidField)
	return e
}

// deliveryName refuses what is no full name of a delivery before a server is asked.
func deliveryName(name string) (string, error) {
	if !strings.HasPrefix(name, namespaces) || !strings.Contains(name, "/deliveries/") {
		e := newError(codes.InvalidArgument, fmt.Sprintf("%q is no delivery: want its full name, namespaces/NAMESPACE/deliveries/ID", name))
		e.Reason = string(ErrInvalidField)
		return "", e
	}
	return name, nil
}
