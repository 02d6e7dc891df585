package api_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func TestSecretService(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	ctx, name := t.Context(), "namespaces/acme/secrets/signing"
	made, err := w.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: "signing", Kind: grapnelv1.Secret_KIND_HMAC})
	if err != nil {
		t.Fatal(err)
	}
	value := made.GetGeneratedValue()
	if !strings.HasPrefix(value, "whsec_") || made.GetSecret().GetName() != name || len(made.GetSecret().GetVersions()) != 1 {
		t.Fatalf("created = %v", made.GetSecret())
	}
	given := "whsec_" + strings.Repeat("QUFB", 8)
	rotated, err := w.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{
		Name: name, Value: given, Overlap: durationpb.New(time.Hour), Etag: made.GetSecret().GetEtag(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := rotated.GetSecret(); rotated.GetGeneratedValue() != "" || len(got.GetVersions()) != 2 || got.GetVersions()[0].GetVersion() != 2 ||
		got.GetVersions()[0].GetExpireTime() != nil || time.Until(got.GetVersions()[1].GetExpireTime().AsTime()) > time.Hour {
		t.Errorf("rotated = %v", rotated)
	}
	_, err = w.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: name, Etag: made.GetSecret().GetEtag()})
	if r := refused(t, err, codes.Aborted, "ETAG_MISMATCH"); r.metadata["currentEtag"] != rotated.GetSecret().GetEtag() {
		t.Errorf("currentEtag = %q", r.metadata["currentEtag"])
	}
	// Without an overlap the old version is of no use at once; without saying, it lives for a day.
	again, err := w.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(again.GetSecret().GetVersions()[1].GetExpireTime().AsTime()); left < 23*time.Hour || left > 24*time.Hour {
		t.Errorf("the old version is in use for %v more, want a day", left)
	}

	read, err := w.secrets.GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	listed, err := w.secrets.ListSecrets(ctx, &grapnelv1.ListSecretsRequest{Parent: "namespaces/acme"})
	if err != nil || len(listed.GetSecrets()) != 2 {
		t.Fatalf("listed = %v, %v", listed, err)
	}
	shown := prototext.Format(read) + prototext.Format(listed) + w.log.String()
	for _, v := range []string{value, given, again.GetGeneratedValue()} {
		if strings.Contains(shown, strings.TrimPrefix(v, "whsec_")) {
			t.Errorf("a read or the log shows the value %q", v)
		}
	}
}

func TestSecretServiceRefuses(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	w.namespace(t, "beta")
	ctx := t.Context()
	create := func(id string, kind grapnelv1.Secret_Kind, value string) error {
		_, err := w.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: id, Kind: kind, Value: value})
		return err
	}
	if r := refused(t, create("key", grapnelv1.Secret_KIND_HMAC, ""), codes.AlreadyExists, "RESOURCE_EXISTS"); r.resource != "namespaces/acme/secrets/key" {
		t.Errorf("resource = %q", r.resource)
	}
	refused(t, create("", grapnelv1.Secret_KIND_HMAC, ""), codes.InvalidArgument, "INVALID_FIELD").names(t, "secret_id")
	refused(t, create("x", 99, ""), codes.InvalidArgument, "INVALID_FIELD").names(t, "kind")
	refused(t, create("x", grapnelv1.Secret_KIND_UNSPECIFIED, ""), codes.InvalidArgument, "INVALID_FIELD").names(t, "value")
	r := refused(t, create("x", grapnelv1.Secret_KIND_HMAC, "hunter2-hunter2"), codes.InvalidArgument, "INVALID_FIELD")
	if r.names(t, "value"); strings.Contains(r.message, "hunter2") || strings.Contains(w.log.String(), "hunter2") {
		t.Errorf("the value is repeated: %q", r.message)
	}
	_, err := w.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/nowhere", SecretId: "x", Kind: grapnelv1.Secret_KIND_HMAC})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	_, err = w.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: "namespaces/acme/secrets/key", Overlap: durationpb.New(8 * 24 * time.Hour)})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "overlap")
	_, err = w.secrets.GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: "namespaces/acme/key"})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "name")
	_, err = w.secrets.GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: "namespaces/acme/secrets/nothing"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	_, err = w.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: "namespaces/acme/secrets/nothing"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	_, err = w.secrets.ListSecrets(ctx, &grapnelv1.ListSecretsRequest{Parent: "namespaces/nowhere"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")

	// In use, then not.
	sub := w.subscribe(t, "acme", "orders", nil)
	_, err = w.secrets.DeleteSecret(ctx, &grapnelv1.DeleteSecretRequest{Name: "namespaces/acme/secrets/key"})
	if r := refused(t, err, codes.FailedPrecondition, "RESOURCE_IN_USE"); len(r.blockers) != 1 || r.blockers[0] != sub.GetName() {
		t.Errorf("blockers = %q, want %q", r.blockers, sub.GetName())
	}
	if _, err := w.subscriptions.DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: sub.GetName()}); err != nil {
		t.Fatal(err)
	}
	_, err = w.secrets.DeleteSecret(ctx, &grapnelv1.DeleteSecretRequest{Name: "namespaces/acme/secrets/key", Etag: "stale"})
	refused(t, err, codes.Aborted, "ETAG_MISMATCH")
	if _, err := w.secrets.DeleteSecret(ctx, &grapnelv1.DeleteSecretRequest{Name: "namespaces/acme/secrets/key"}); err != nil {
		t.Fatal(err)
	}
	_, err = w.secrets.DeleteSecret(ctx, &grapnelv1.DeleteSecretRequest{Name: "namespaces/acme/secrets/key"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	if _, err := w.secrets.DeleteSecret(ctx, &grapnelv1.DeleteSecretRequest{Name: "namespaces/acme/secrets/key", AllowMissing: true}); err != nil {
		t.Error(err)
	}
}

func TestListSecretsPages(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	w.namespace(t, "beta")
	for _, id := range []string{"a", "b"} {
		_, err := w.secrets.CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
			Parent: "namespaces/beta", SecretId: id, Kind: grapnelv1.Secret_KIND_OPAQUE, Value: "opaque",
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for parent, want := range map[string]string{
		"namespaces/-":    "namespaces/acme/secrets/key namespaces/beta/secrets/a namespaces/beta/secrets/b namespaces/beta/secrets/key",
		"namespaces/acme": "namespaces/acme/secrets/key",
	} {
		var names []string
		req := &grapnelv1.ListSecretsRequest{Parent: parent, PageSize: 1}
		for {
			page, err := w.secrets.ListSecrets(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range page.GetSecrets() {
				names = append(names, s.GetName())
			}
			if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
				break
			}
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s lists %q, want %q", parent, got, want)
		}
	}
}
