package client

import (
	"context"
	"iter"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ReplayService returns the generated client.
func (c *Client) ReplayService() grapnelv1.ReplayServiceClient {
	return grapnelv1.NewReplayServiceClient(c.control)
}

// CreateReplay starts a replay job; job holds what it is to do, and needs its StartTime. An empty id lets the server pick
// one; a call that is repeated with an id finds the first job. ErrInvalidState
// when three jobs of the namespace go on, or the subscription is disabled.
func (c *Client) CreateReplay(ctx context.Context, namespace, id string, job *grapnelv1.ReplayJob) (*grapnelv1.ReplayJob, error) {
	return c.createReplay(ctx, namespace, id, job, false)
}

// CountReplay counts what a replay job would do, and starts none: see its ScannedCount and CreatedCount.
func (c *Client) CountReplay(ctx context.Context, namespace string, job *grapnelv1.ReplayJob) (*grapnelv1.ReplayJob, error) {
	return c.createReplay(ctx, namespace, "", job, true)
}

func (c *Client) createReplay(ctx context.Context, namespace, id string, job *grapnelv1.ReplayJob, only bool) (*grapnelv1.ReplayJob, error) {
	short, err := shortID(namespace, "replayJobs", id)
	if err != nil {
		return nil, err
	}
	request := &grapnelv1.CreateReplayJobRequest{Parent: namespaceName(namespace), ReplayJobId: short, ReplayJob: job, ValidateOnly: only}
	if short == "" {
		request.RequestId = uuid.NewString()
	}
	r, err := c.ReplayService().CreateReplayJob(ctx, request)
	return r.GetReplayJob(), err
}

// GetReplay reads a replay job.
func (c *Client) GetReplay(ctx context.Context, namespace, id string) (*grapnelv1.ReplayJob, error) {
	name, err := resourceName(namespace, "replayJobs", id)
	if err != nil {
		return nil, err
	}
	r, err := c.ReplayService().GetReplayJob(ctx, &grapnelv1.GetReplayJobRequest{Name: name})
	return r.GetReplayJob(), err
}

// WaitReplay returns when a replay job has ended, however it has, or ctx. progress, unless nil, is told how it stands about
// every second, and last when it has ended.
func (c *Client) WaitReplay(ctx context.Context, namespace, id string, progress func(*grapnelv1.ReplayJob)) (*grapnelv1.ReplayJob, error) {
	name, err := resourceName(namespace, "replayJobs", id)
	if err != nil {
		return nil, err
	}
	for {
		r, err := c.ReplayService().WaitReplayJob(ctx, &grapnelv1.WaitReplayJobRequest{Name: name, Timeout: durationpb.New(time.Second)})
		if err != nil {
			return nil, err
		}
		if progress != nil {
			progress(r.GetReplayJob())
		}
		if ReplayEnded(r.GetReplayJob()) {
			return r.GetReplayJob(), nil
		}
	}
}

// ReplayEnded reports whether a replay job makes no further deliveries.
func ReplayEnded(job *grapnelv1.ReplayJob) bool {
	switch job.GetState() {
	case grapnelv1.ReplayJob_STATE_PENDING, grapnelv1.ReplayJob_STATE_RUNNING, grapnelv1.ReplayJob_STATE_UNSPECIFIED:
		return false
	}
	return true
}

// CancelReplay stops a replay job; what it has made goes on. ErrInvalidState when it has ended otherwise.
func (c *Client) CancelReplay(ctx context.Context, namespace, id string) (*grapnelv1.ReplayJob, error) {
	name, err := resourceName(namespace, "replayJobs", id)
	if err != nil {
		return nil, err
	}
	r, err := c.ReplayService().CancelReplayJob(ctx, &grapnelv1.CancelReplayJobRequest{Name: name})
	return r.GetReplayJob(), err
}

// Replays lists the replay jobs of a namespace, newest first.
func (c *Client) Replays(ctx context.Context, namespace string, opts ...ListOption) iter.Seq2[*grapnelv1.ReplayJob, error] {
	s := listOptions(opts)
	return pages(func(token string) ([]*grapnelv1.ReplayJob, string, error) {
		r, err := c.ReplayService().ListReplayJobs(ctx, &grapnelv1.ListReplayJobsRequest{
			Parent: namespaceName(namespace), PageSize: s.pageSize, PageToken: token, Filter: s.filter,
		})
		return r.GetReplayJobs(), r.GetNextPageToken(), err
	})
}
