package api

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // described to clients that print details
	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	alphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// RegisterReflection lets callers of g ask what it serves, comments included, in both versions of the question that
// clients have. Call it after Register.
func (s *Server) RegisterReflection(g *grpc.Server) {
	o := reflection.ServerOptions{Services: g, DescriptorResolver: &commented{}}
	r := registrar{g, s.edge}
	reflectionpb.RegisterServerReflectionServer(r, reflection.NewServerV1(o))
	alphapb.RegisterServerReflectionServer(r, reflection.NewServer(o))
}

// private begins the names of what is stored and nobody's business.
const private = "grapnel.store."

// commented finds descriptors in the embedded set, which has comments, then among the linked ones, but not what is
// private. The set is unpacked when someone first asks.
type commented struct {
	once  sync.Once
	files *protoregistry.Files
}

// set is the embedded set; an empty one when it cannot be read, which a test excludes.
func (c *commented) set() *protoregistry.Files {
	c.once.Do(func() {
		if c.files, _ = embeddedFiles(); c.files == nil {
			c.files = &protoregistry.Files{}
		}
	})
	return c.files
}

func (c *commented) FindFileByPath(path string) (protoreflect.FileDescriptor, error) {
	if d, err := c.set().FindFileByPath(path); err == nil {
		return d, nil
	}
	if strings.HasPrefix(path, strings.ReplaceAll(private, ".", "/")) {
		return nil, protoregistry.NotFound
	}
	return protoregistry.GlobalFiles.FindFileByPath(path)
}

func (c *commented) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	if d, err := c.set().FindDescriptorByName(name); err == nil {
		return d, nil
	}
	if strings.HasPrefix(string(name)+".", private) {
		return nil, protoregistry.NotFound
	}
	return protoregistry.GlobalFiles.FindDescriptorByName(name)
}

// embeddedFiles unpacks the embedded descriptor set.
func embeddedFiles() (*protoregistry.Files, error) {
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(grapnelv1.Descriptors(), set); err != nil {
		return nil, fmt.Errorf("unpack embedded descriptors: %w", err)
	}
	if len(set.GetFile()) == 0 {
		return nil, errors.New("embedded descriptors are empty")
	}
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return nil, fmt.Errorf("link embedded descriptors: %w", err)
	}
	return files, nil
}
