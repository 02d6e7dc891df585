package grapnelv1

import _ "embed"

//go:embed descriptors.binpb
var descriptors string

// Descriptors is a google.protobuf.FileDescriptorSet of the protos of this repository and what they import,
// with their comments, which the generated code has not. `make generate` writes it.
func Descriptors() []byte { return []byte(descriptors) }
