package api

import (
	"net/url"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/grapnel/grapnel/server/delivery"
)

// Collections of a namespace, as they stand in resource names.
const (
	collectionSubscriptions = "subscriptions"
	collectionSecrets       = "secrets"
	collectionEvents        = "events"
	collectionDeliveries    = "deliveries"
	collectionReplayJobs    = "replayJobs"
	collectionErasures      = "erasures"
	collectionEventTypes    = "eventTypes"
)

// allNamespaces is the wildcard of parents in reading calls.
const allNamespaces = "-"

func namespaceName(ns string) string        { return "namespaces/" + ns }
func subscriptionName(ns, id string) string { return resourceName(ns, collectionSubscriptions, id) }
func secretName(ns, id string) string       { return resourceName(ns, collectionSecrets, id) }
func replayJobName(ns, id string) string    { return resourceName(ns, collectionReplayJobs, id) }
func erasureName(ns, id string) string      { return resourceName(ns, collectionErasures, id) }
func eventTypeName(ns, id string) string    { return resourceName(ns, collectionEventTypes, escapeID(id)) }
func eventName(ns, id string) string        { return resourceName(ns, collectionEvents, escapeID(id)) }
func pluginName(id string) string           { return "plugins/" + id }
func nodeName(id string) string             { return "nodes/" + id }

func deliveryName(ns string, id delivery.ID) string {
	return resourceName(ns, collectionDeliveries, id.String())
}

func resourceName(ns, collection, id string) string {
	return "namespaces/" + ns + "/" + collection + "/" + id
}

// parseNamespace takes the id out of namespaces/NAME. field is the request field that a refusal names.
func parseNamespace(field, name string) (string, error) {
	ns, ok := strings.CutPrefix(name, "namespaces/")
	if ok && ns == allNamespaces {
		return "", invalid(Violation{field, "must name one namespace; namespaces/- is for reading calls that say so", "name"})
	}
	if !ok || !isResourceID(ns) {
		return "", invalid(badName(field, "namespaces/NAME", name))
	}
	return ns, nil
}

// parseParent is parseNamespace that also takes namespaces/-, for which it returns "".
func parseParent(field, name string) (string, error) {
	if name == "namespaces/"+allNamespaces {
		return "", nil
	}
	return parseNamespace(field, name)
}

// parseName takes namespace and id out of namespaces/NAME/collection/ID.
func parseName(field, name, collection string) (ns, id string, err error) {
	form := "namespaces/NAME/" + collection + "/ID"
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[0] != "namespaces" || parts[2] != collection || !isResourceID(parts[1]) {
		return "", "", invalid(badName(field, form, name))
	}
	valid := isResourceID
	switch collection {
	case collectionEvents:
		id, ok := unescapeID(parts[3])
		if !ok {
			return "", "", invalid(badName(field, form+", with %XX for what is not a letter, digit or one of . _ ~ -", name))
		}
		return parts[1], id, nil
	case collectionEventTypes:
		id, ok := unescapeID(parts[3])
		if !ok || !isEventType(id) {
			return "", "", invalid(badName(field, form+", with %XX for what is not a letter, digit or one of . _ ~ -", name))
		}
		return parts[1], id, nil
	case collectionDeliveries:
		valid = func(id string) bool { _, err := delivery.ParseID(id); return err == nil }
	}
	if !valid(parts[3]) {
		return "", "", invalid(badName(field, form, name))
	}
	return parts[1], parts[3], nil
}

// parseDelivery takes namespace and id out of the name of a delivery.
func parseDelivery(field, name string) (string, delivery.ID, error) {
	ns, text, err := parseName(field, name, collectionDeliveries)
	if err != nil {
		return "", delivery.ID{}, err
	}
	id, err := delivery.ParseID(text)
	if err != nil {
		return "", delivery.ID{}, invalid(badName(field, "namespaces/NAME/deliveries/ID", name))
	}
	return ns, id, nil
}

// parsePlugin takes the id out of plugins/NAME.
func parsePlugin(field, name string) (string, error) {
	id, ok := strings.CutPrefix(name, "plugins/")
	if !ok || !isResourceID(id) {
		return "", invalid(badName(field, "plugins/NAME", name))
	}
	return id, nil
}

func badName(field, form, got string) Violation {
	if got == "" {
		return Violation{field, "is required; it looks like " + form, "name"}
	}
	return Violation{field, "must look like " + form + ", not " + quote(got), "name"}
}

// quote shows what a caller sent without letting it fill the message.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return `"` + s + `"`
}

// isResourceID reports whether s is an id that a user may choose: it fits a DNS label and an etcd path.
func isResourceID(s string) bool {
	if s == "" || len(s) > 63 || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	for i := 1; i < len(s); i++ {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// isToken reports whether s is fit for a log and a header whoever sent it.
func isToken(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !isAlnum(c) && c != '.' && c != '_' && c != '~' && c != '-' {
			return false
		}
	}
	return true
}

// isEventID reports whether s may be an event's id, which is what CloudEvents allows.
func isEventID(s string) bool {
	return s != "" && utf8.ValidString(s) && isText(s, maxEventID, true)
}

// Ids of events are the publisher's: names of resources, which are for URLs and command lines (AIP-122), show what is
// not unreserved in RFC 3986 as %XX, byte by byte. Each id has one name.

func isUnreserved(c byte) bool { return isAlnum(c) || c == '.' || c == '_' || c == '~' || c == '-' }

// escapeID is the last segment of an event's name.
func escapeID(id string) string {
	n := 0
	for i := range len(id) {
		if !isUnreserved(id[i]) {
			n++
		}
	}
	if n == 0 {
		return id
	}
	const hex = "0123456789ABCDEF"
	b := make([]byte, 0, len(id)+2*n)
	for i := range len(id) {
		if c := id[i]; isUnreserved(c) {
			b = append(b, c)
		} else {
			b = append(b, '%', hex[c>>4], hex[c&15])
		}
	}
	return string(b)
}

// unescapeID is the id in the last segment of an event's name; false when there is none.
func unescapeID(segment string) (string, bool) {
	for i := range len(segment) {
		if c := segment[i]; !isUnreserved(c) && c != '%' {
			return "", false
		}
	}
	id, err := url.PathUnescape(segment)
	return id, err == nil && isEventID(id)
}

func isAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// isResourceName reports whether name is well formed, so that it may go to a log whatever a caller sent.
func isResourceName(name string) bool {
	parts := strings.Split(name, "/")
	switch len(parts) {
	case 2:
		return (parts[0] == "namespaces" && parts[1] == allNamespaces) ||
			(parts[0] == "namespaces" || parts[0] == "plugins" || parts[0] == "nodes") && isResourceID(parts[1])
	case 4:
		if parts[0] != "namespaces" || !isResourceID(parts[1]) {
			return false
		}
		switch parts[2] {
		case collectionSubscriptions, collectionSecrets, collectionDeliveries, collectionReplayJobs, collectionErasures:
			return isResourceID(parts[3]) || parts[2] == collectionDeliveries && isToken(parts[3])
		case collectionEvents, collectionEventTypes:
			_, ok := unescapeID(parts[3])
			return ok
		}
	}
	return false
}

// resourceOf is the name that a request is about: its name, its parent, or the name of the resource in it.
// It is what the caller sent, not yet checked.
func resourceOf(req any) string {
	if m, ok := req.(interface{ GetName() string }); ok {
		return m.GetName()
	}
	if m, ok := req.(interface{ GetParent() string }); ok {
		return m.GetParent()
	}
	m, ok := req.(proto.Message)
	if !ok {
		return ""
	}
	name := ""
	m.ProtoReflect().Range(func(_ protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if sub, ok := v.Interface().(protoreflect.Message); ok && name == "" {
			if named, ok := sub.Interface().(interface{ GetName() string }); ok {
				name = named.GetName()
			}
		}
		return true
	})
	return name
}

// typeOf names the message type of a resource, for ResourceInfo.
func typeOf(name string) string {
	parts := strings.Split(name, "/")
	if len(parts) < 2 {
		return ""
	}
	switch parts[len(parts)-2] {
	case "namespaces":
		return "grapnel.v1.Namespace"
	case collectionSubscriptions:
		return "grapnel.v1.Subscription"
	case collectionSecrets:
		return "grapnel.v1.Secret"
	case collectionEvents:
		return "grapnel.v1.Event"
	case collectionEventTypes:
		return "grapnel.v1.EventType"
	case collectionDeliveries:
		return "grapnel.v1.Delivery"
	case collectionReplayJobs:
		return "grapnel.v1.ReplayJob"
	case collectionErasures:
		return "grapnel.v1.Erasure"
	case "plugins":
		return "grapnel.v1.Plugin"
	case "nodes":
		return "grapnel.v1.Node"
	}
	return ""
}
