package client

import (
	"context"
	"iter"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ErasureService returns the generated client.
func (c *Client) ErasureService() grapnelv1.ErasureServiceClient {
	return grapnelv1.NewErasureServiceClient(c.control)
}

// CreateErasure starts an erasure; job holds what it is to purge, and needs its Filter or its Condition. An empty id lets the
// server pick one; a call that is repeated with an id finds the first job. ErrInvalidState when three erasures of the
// namespace go on.
func (c *Client) CreateErasure(ctx context.Context, namespace, id string, job *grapnelv1.Erasure) (*grapnelv1.Erasure, error) {
	return c.createErasure(ctx, namespace, id, job, false)
}

// CountErasure counts what an erasure would purge, and starts none: see its ErasedCount.
func (c *Client) CountErasure(ctx context.Context, namespace string, job *grapnelv1.Erasure) (*grapnelv1.Erasure, error) {
	return c.createErasure(ctx, namespace, "", job, true)
}

func (c *Client) createErasure(ctx context.Context, namespace, id string, job *grapnelv1.Erasure, only bool) (*grapnelv1.Erasure, error) {
	short, err := shortID(namespace, "erasures", id)
	if err != nil {
		return nil, err
	}
	request := &grapnelv1.CreateErasureRequest{Parent: namespaceName(namespace), ErasureId: short, Erasure: job, ValidateOnly: only}
	if short == "" {
		request.RequestId = uuid.NewString()
	}
	r, err := c.ErasureService().CreateErasure(ctx, request)
	return r.GetErasure(), err
}

// GetErasure reads an erasure.
func (c *Client) GetErasure(ctx context.Context, namespace, id string) (*grapnelv1.Erasure, error) {
	name, err := resourceName(namespace, "erasures", id)
	if err != nil {
		return nil, err
	}
	r, err := c.ErasureService().GetErasure(ctx, &grapnelv1.GetErasureRequest{Name: name})
	return r.GetErasure(), err
}

// WaitErasure returns when an erasure has ended, however it has, or ctx. progress, unless nil, is told how it stands about
// every second, and last when it has ended.
func (c *Client) WaitErasure(ctx context.Context, namespace, id string, progress func(*grapnelv1.Erasure)) (*grapnelv1.Erasure, error) {
	name, err := resourceName(namespace, "erasures", id)
	if err != nil {
		return nil, err
	}
	for {
		r, err := c.ErasureService().WaitErasure(ctx, &grapnelv1.WaitErasureRequest{Name: name, Timeout: durationpb.New(time.Second)})
		if err != nil {
			return nil, err
		}
		if progress != nil {
			progress(r.GetErasure())
		}
		if ErasureEnded(r.GetErasure()) {
			return r.GetErasure(), nil
		}
	}
}

// ErasureEnded reports whether an erasure purges nothing further.
func ErasureEnded(job *grapnelv1.Erasure) bool {
	switch job.GetState() {
	case grapnelv1.Erasure_STATE_PENDING, grapnelv1.Erasure_STATE_RUNNING, grapnelv1.Erasure_STATE_UNSPECIFIED:
		return false
	}
	return true
}

// CancelErasure stops an erasure; what it has purged stays so. ErrInvalidState when it has ended otherwise.
func (c *Client) CancelErasure(ctx context.Context, namespace, id string) (*grapnelv1.Erasure, error) {
	name, err := resourceName(namespace, "erasures", id)
	if err != nil {
		return nil, err
	}
	r, err := c.ErasureService().CancelErasure(ctx, &grapnelv1.CancelErasureRequest{Name: name})
	return r.GetErasure(), err
}

// Erasures lists the erasures of a namespace, newest first.
func (c *Client) Erasures(ctx context.Context, namespace string, opts ...ListOption) iter.Seq2[*grapnelv1.Erasure, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.Erasure, string, error) {
		r, err := c.ErasureService().ListErasures(ctx, &grapnelv1.ListErasuresRequest{
			Parent: namespaceName(namespace), PageSize: s.pageSize, PageToken: token, Filter: s.filter,
		})
		return r.GetErasures(), r.GetNextPageToken(), err
	})
}
