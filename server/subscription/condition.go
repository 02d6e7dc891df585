package subscription

type condition struct{}
