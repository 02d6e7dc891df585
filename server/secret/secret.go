// Package secret owns key material: how it is made, checked, sealed at rest, rotated with overlap and
// forgotten. A Store keeps sealed records in etcd and the live values in memory, fed by a watch.
//
// A value is made and checked here by its kind (Make), or by the plugin that it is for, of which this package
// keeps no more than the name.
//
// It guarantees that a value is stored only sealed, bound to its name, version, kind and plugin; that what was
// sealed under another key or moved between records is never used; that an expired version is not handed
// out for a moment longer; and that no error, log line or metadata holds a value. A secret that a
// subscription refers to cannot be deleted, not even by two calls at once. It does not know who signs what.
package secret

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const (
	// DefaultOverlap is how long an old version stays in use when a rotation does not say.
	DefaultOverlap = 24 * time.Hour
	// MaxOverlap is the longest overlap.
	MaxOverlap = 7 * 24 * time.Hour
	// MaxVersions is how many versions may be live at once.
	MaxVersions = 10
)

// Secret is one secret as stored. Immutable. It holds values, so it prints as its name only.
type Secret struct {
	// Proto is the metadata: versions that are live when it was read, no values. It must not be changed.
	Proto *grapnelv1.Secret
	// Namespace and ID are the segments of the name.
	Namespace string
	ID        string
	// Revision is etcd's modification revision of the stored record.
	Revision int64
	// Fault says why some versions cannot be used, nil when all can.
	Fault error

	record *storev1.SecretRecord
	// versions are the opened values, newest first.
	versions []Version
}

// Version is one live value. It prints without the value.
type Version struct {
	// Number rises from 1.
	Number int
	// Value is what was given or generated, in its written form (whsec_… for HMAC). It is shared and must
	// not be changed.
	Value []byte
	// ExpireTime is zero for the newest.
	ExpireTime time.Time
}

// String returns the name.
func (s Secret) String() string { return s.name() }

// GoString keeps values out of %#v.
func (s Secret) GoString() string { return "secret.Secret(" + s.name() + ")" }

// String leaves the value out.
func (v Version) String() string { return "version " + strconv.Itoa(v.Number) }

// GoString leaves the value out.
func (v Version) GoString() string { return "secret.Version(" + strconv.Itoa(v.Number) + ")" }

// MarshalJSON leaves the value out.
func (v Version) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, `{"Number":%d}`, v.Number), nil
}

func (s Secret) name() string { return secretName(s.Namespace, s.ID) }

// decode opens a stored record. A version that cannot be opened is left out and named in Fault; an error
// means that the record as a whole is of no use.
func decode(key string, value []byte, revision int64, keys *keyring) (*Secret, error) {
	ns, id, ok := splitName(key)
	if !ok {
		return nil, fmt.Errorf("%q is not a secret's key", key)
	}
	rec := &storev1.SecretRecord{}
	if err := proto.Unmarshal(value, rec); err != nil {
		return nil, fmt.Errorf("read secret: %w", err)
	}
	if rec.Name != key {
		return nil, fmt.Errorf("holds the secret %q: %w", rec.Name, ErrTampered)
	}
	s := &Secret{Namespace: ns, ID: id, Revision: revision, record: rec}
	for _, v := range rec.Versions {
		plain, err := keys.open(rec, v)
		if err != nil {
			s.Fault = fmt.Errorf("%s version %d: %w", key, v.Version, err)
			continue
		}
		s.versions = append(s.versions, Version{Number: int(v.Version), Value: plain, ExpireTime: unixTime(v.ExpireTime)})
	}
	s.Proto = s.metadata(time.Now())
	return s, nil
}

// metadata is what callers may see of a secret at a time.
func (s *Secret) metadata(now time.Time) *grapnelv1.Secret {
	p := &grapnelv1.Secret{
		Name:       s.record.Name,
		Kind:       grapnelv1.Secret_Kind(s.record.Kind),
		CreateTime: timestamp(s.record.CreateTime),
		Etag:       etag(s.Revision),
		Plugin:     s.record.Plugin,
		Slot:       s.record.Slot,
	}
	for _, v := range liveRecords(s.record.Versions, now) {
		version := &grapnelv1.SecretVersion{
			Version:     int32(v.Version),
			Fingerprint: v.Fingerprint,
			CreateTime:  timestamp(v.CreateTime),
			ExpireTime:  timestamp(v.ExpireTime),
			Algorithm:   v.Algorithm,
			PublicKey:   v.PublicKey,
			Jwk:         v.Jwk,
			KeyId:       v.SigningKeyId,
		}
		if p.Kind == grapnelv1.Secret_KIND_ED25519 {
			version.Jwk, version.KeyId = standardWebhooksJWK(v.PublicKey)
		}
		p.Versions = append(p.Versions, version)
		if v.PublicKey != "" {
			p.PublicKeys = append(p.PublicKeys, v.PublicKey)
		}
	}
	return p
}

// at returns the secret as it is to be seen at a time: without what has expired since it was read.
func (s *Secret) at(now time.Time) *Secret {
	if len(s.Proto.Versions) == len(liveRecords(s.record.Versions, now)) {
		return s
	}
	seen := *s
	seen.Proto = s.metadata(now)
	seen.versions = s.live(now)
	return &seen
}

// live returns the versions that may be used at a time.
func (s *Secret) live(now time.Time) []Version {
	expired := func(v Version) bool { return !v.ExpireTime.IsZero() && !v.ExpireTime.After(now) }
	if !slices.ContainsFunc(s.versions, expired) {
		return s.versions
	}
	return slices.DeleteFunc(slices.Clone(s.versions), expired)
}

// nextExpiry returns when the first of the stored versions expires, zero when none does.
func (s *Secret) nextExpiry() time.Time {
	var next time.Time
	for _, v := range s.record.Versions {
		if at := unixTime(v.ExpireTime); !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	return next
}

func liveRecords(versions []*storev1.SecretVersionRecord, now time.Time) []*storev1.SecretVersionRecord {
	out := make([]*storev1.SecretVersionRecord, 0, len(versions))
	for _, v := range versions {
		if v.ExpireTime == 0 || v.ExpireTime > now.UnixNano() {
			out = append(out, v)
		}
	}
	return out
}

func unixTime(nanos int64) time.Time {
	if nanos == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanos)
}

func timestamp(nanos int64) *timestamppb.Timestamp {
	if nanos == 0 {
		return nil
	}
	return timestamppb.New(unixTime(nanos))
}

func etag(revision int64) string { return strconv.FormatInt(revision, 36) }

// keyPrefix stands before the name of a secret in its key, so that who wants all secrets reads nothing else.
const keyPrefix = "secrets/"

func secretName(ns, id string) string { return "namespaces/" + ns + "/secrets/" + id }

// splitName takes namespaces/{ns}/secrets/{id} apart.
func splitName(name string) (ns, id string, ok bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[0] != "namespaces" || parts[2] != "secrets" {
		return "", "", false
	}
	return parts[1], parts[3], validID(parts[1]) && validID(parts[3])
}

// validID reports whether an ID may become part of a name, and so of an etcd key.
func validID(id string) bool {
	if len(id) == 0 || len(id) > 63 || id[0] < 'a' || id[0] > 'z' {
		return false
	}
	return strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}
