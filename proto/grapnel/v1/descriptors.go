package grapnelv1

import _ "embed"

//go:embed descriptors.binpb
var descriptors string

// Descriptors is a google.protobuf.FileDescriptorSet of the public API, the plugin protocol, what receivers over
// gRPC implement, google.rpc's error details, and what they import, with the comments that generated code has
// not. `make generate` writes it.
func Descriptors() []byte { return []byte(descriptors) }
