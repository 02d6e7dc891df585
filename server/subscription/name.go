package subscription

import (
	"strings"
)

const idRule = "1 to 63 lower case letters, digits and hyphens, beginning with a letter"

// validID reports whether an ID may become part of a name, and so of an etcd key.
func validID(id string) bool {
	if len(id) == 0 || len(id) > 63 || id[0] < 'a' || id[0] > 'z' {
		return false
	}
	for i := range len(id) {
		c := id[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

func namespaceName(ns string) string        { return "namespaces/" + ns }
func subscriptionName(ns, id string) string { return "namespaces/" + ns + "/subscriptions/" + id }

// splitName takes namespaces/{ns}[/{kind}/{id}] apart; kind and id are empty for a namespace.
func splitName(name string) (ns, kind, id string, ok bool) {
	rest, found := strings.CutPrefix(name, "namespaces/")
	if !found {
		return "", "", "", false
	}
	ns, rest, found = strings.Cut(rest, "/")
	if !found {
		return ns, "", "", validID(ns)
	}
	kind, id, _ = strings.Cut(rest, "/")
	return ns, kind, id, validID(ns) && validID(id)
}

// Keys beside the resources; none of them is followed.

// secretKey is where package secret keeps a secret.
func secretKey(name string) string { return "secrets/" + name }

// eventTypeKey is where package eventtype keeps an event type.
func eventTypeKey(name string) string { return "eventtypes/" + name }

// refKey exists while a subscription refers to a secret.
func refKey(secretName, subName string) string { return "refs/" + secretName + "/" + subName }

// requestKey remembers the outcome of a create call for a day.
func requestKey(ns, requestID string) string {
	return "requests/" + namespaceName(ns) + "/" + requestID
}

// quotaKey is written by every create under a quota: see writing.admit.
func quotaKey(ns string) string { return "quota/" + namespaceName(ns) }

// checkIDs returns an *InvalidError when an ID given by a caller could not be part of a name.
func checkIDs(fields ...string) error {
	var c checker
	for i := 0; i+1 < len(fields); i += 2 {
		if field, id := fields[i], fields[i+1]; !validID(id) {
			c.add(field, "id", "%q is not a valid ID: want %s", id, idRule)
		}
	}
	return c.err()
}
