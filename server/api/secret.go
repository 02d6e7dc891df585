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
	kind := r.GetKind()
	if kind == grapnelv1.Secret_KIND_UNSPECIFIED {
		kind = grapnelv1.Secret_KIND_OPAQUE
	}
	made, generated, err := s.Secrets.Create(ctx, ns, r.GetSecretId(), kind, r.GetValue())
	if err != nil {
		return nil, toStatus(err, secretName(ns, r.GetSecretId()))
	}
	return &grapnelv1.CreateSecretResponse{Secret: made.Proto, GeneratedValue: generated}, nil
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
		func(found *secret.Secret) string { return found.Namespace + "/" + found.ID })
	out := &grapnelv1.ListSecretsResponse{NextPageToken: s.pages.seal(page.next, query...)}
	for _, found := range page.items {
		out.Secrets = append(out.Secrets, found.Proto)
	}
	return out, nil
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
	rotated, generated, err := s.Secrets.Rotate(ctx, ns, id, r.GetValue(), overlap, r.GetEtag())
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.RotateSecretResponse{Secret: rotated.Proto, GeneratedValue: generated}, nil
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
