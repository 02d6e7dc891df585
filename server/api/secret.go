package api

import (
	"context"
	"errors"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/secret"
)

// CreateSecret stores the value given, or makes one and shows it this once.
func (s secretService) CreateSecret(ctx context.Context, r *grapnelv1.CreateSecretRequest) (*grapnelv1.CreateSecretResponse, error) {
	ns, err := parseNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	name := secretName(ns, r.GetSecretId())
	m, err := s.material(ctx, ns, name, r)
	if err != nil {
		return nil, toStatus(err, name)
	}
	made, err := s.Secrets.Create(ctx, ns, r.GetSecretId(), m)
	if err != nil {
		return nil, toStatus(err, name)
	}
	return &grapnelv1.CreateSecretResponse{Secret: made.Proto, GeneratedValue: m.Generated()}, nil
}

// material checks or makes the value of a new secret.
func (s secretService) material(ctx context.Context, ns, name string, r *grapnelv1.CreateSecretRequest) (secret.Material, error) {
	if r.GetPlugin() == "" {
		if faults := withoutPlugin(r.GetSlot(), r.GetAlgorithm()); len(faults) > 0 {
			return secret.Material{}, invalid(faults...)
		}
		return secret.Make(r.GetKind(), r.GetValue())
	}
	if kind := r.GetKind(); kind != grapnelv1.Secret_KIND_UNSPECIFIED && kind != grapnelv1.Secret_KIND_OPAQUE {
		return secret.Material{}, invalid(Violation{"kind", kind.String() + " says how a value is made without a plugin; leave kind out, " +
			"since " + r.GetPlugin() + " knows its own keys", "secret.kind"})
	}
	// Making a key can take a second of work, so what the store would refuse comes first.
	if err := s.writable(ns); err != nil {
		return secret.Material{}, err
	}
	if _, err := s.Secrets.Get(ns, r.GetSecretId()); err == nil {
		return secret.Material{}, exists(name, "secret")
	}
	slot, err := s.slotFor(r.GetPlugin(), r.GetSlot())
	if err != nil {
		return secret.Material{}, err
	}
	return s.prepare(ctx, r.GetPlugin(), slot, r.GetValue(), r.GetAlgorithm())
}

// GetSecret reads metadata only.
func (s secretService) GetSecret(_ context.Context, r *grapnelv1.GetSecretRequest) (*grapnelv1.GetSecretResponse, error) {
	ns, id, err := parseName("name", r.GetName(), collectionSecrets)
	if err != nil {
		return nil, err
	}
	found, err := s.Secrets.Get(ns, id)
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.GetSecretResponse{Secret: found.Proto}, nil
}

// ListSecrets reads one page of metadata in name order.
func (s secretService) ListSecrets(_ context.Context, r *grapnelv1.ListSecretsRequest) (*grapnelv1.ListSecretsResponse, error) {
	ns, err := s.listedNamespace(r.GetParent())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	query := []string{"ListSecrets", r.GetParent()}
	after, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	page := takePage(inNamespaces(s.Registry.Snapshot(), ns, after, s.Secrets.List), size,
		func(*secret.Secret) bool { return true },
		func(found *secret.Secret) string { return found.Namespace + "/" + found.ID },
		func(found *secret.Secret) *grapnelv1.Secret { return found.Proto })
	return &grapnelv1.ListSecretsResponse{Secrets: page.items, NextPageToken: s.pages.seal(page.next, query...)}, nil
}

// RotateSecret adds a version; the one before stays in use for the overlap, 24 hours when not said.
func (s secretService) RotateSecret(ctx context.Context, r *grapnelv1.RotateSecretRequest) (*grapnelv1.RotateSecretResponse, error) {
	ns, id, err := parseName("name", r.GetName(), collectionSecrets)
	if err != nil {
		return nil, err
	}
	overlap := secret.DefaultOverlap
	if r.GetOverlap() != nil {
		overlap = r.GetOverlap().AsDuration()
	}
	m, err := s.nextMaterial(ctx, ns, id, r)
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	rotated, err := s.Secrets.Rotate(ctx, ns, id, m, overlap, r.GetEtag())
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.RotateSecretResponse{Secret: rotated.Proto, GeneratedValue: m.Generated()}, nil
}

// DeleteSecret removes a secret that no subscription refers to.
func (s secretService) DeleteSecret(ctx context.Context, r *grapnelv1.DeleteSecretRequest) (*grapnelv1.DeleteSecretResponse, error) {
	ns, id, err := parseName("name", r.GetName(), collectionSecrets)
	if err != nil {
		return nil, err
	}
	err = s.Secrets.Delete(ctx, ns, id, r.GetEtag())
	if err != nil && !(r.GetAllowMissing() && errors.Is(err, secret.ErrNotFound)) {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.DeleteSecretResponse{}, nil
}
