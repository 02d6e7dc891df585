# Grapnel. `make` lists the targets; `make check` is what CI runs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

TOOL := go tool -modfile=tools/go.mod
KILL_CYCLES ?= 500
MEDDLE_CYCLES ?= 200
ORDER_CYCLES ?= 100
TRANSFORM_CYCLES ?= 20
STORM ?= 60s

.PHONY: help build test race bench limits lint generate baseline protos cross deps ci suite check demo kill storm fuzz clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

build: ## build grapnel and grapnel-bench into bin/
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/... # the journal's memory is then Go's, and so under its limit

test: ## the tests, as the README says
	go test ./...

race: ## the tests under the race detector
	go test -race -timeout 20m ./...

bench: build ## throughput, latency, start and backlog against the raw bound of the same run
	bin/grapnel-bench

limits: build ## what large fan-outs, very many subscriptions, hanging receivers, little memory and long backlogs do to it; about an hour
	for part in fanout lanes hanging memory; do bin/grapnel-bench -only "$$part"; done
	bin/grapnel-bench -only backlog -backlog 1x10000000,10x1000000,100000x10 -limit 1h

kill: ## kill -9 the server KILL_CYCLES times under load, MEDDLE_CYCLES times while others change and delete, ORDER_CYCLES times with ordering keys, and TRANSFORM_CYCLES times with a transformer; nothing may be lost, out of order or otherwise
	go test ./cmd/grapnel-bench -run TestKill -count=1 -timeout 4h -v -kill.cycles=$(KILL_CYCLES) -kill.meddle=$(MEDDLE_CYCLES) -kill.order=$(ORDER_CYCLES) -kill.transform=$(TRANSFORM_CYCLES)

storm: ## kill -9 all plugins every 200 ms for STORM under load, and upgrade one 20 times; nothing may be lost or blamed
	go test ./cmd/grapnel-bench -run 'TestStorm|TestUpgrade' -count=1 -timeout 1h -v -storm.duration=$(STORM) -upgrade.times=20

fuzz: ## a minute of each fuzz target
	go list ./... | while read -r p; do \
	  go test -list '^Fuzz' "$$p" | grep '^Fuzz' | while read -r f; do \
	    go test "$$p" -run '^$$' -fuzz "^$$f$$" -fuzztime 60s; done; done

# proto/buf and proto/google are copies, there so that any protoc compiles ours from a checkout: validate.proto of
# github.com/bufbuild/protovalidate v1.2.2, google/rpc of googleapis, and google/protobuf/descriptor.proto of protobuf 29,
# since older compilers, as distributions have them, do not know debug_redact.
SHIPPED := --path proto/grapnel/v1 --path proto/grapnel/plugin --path proto/grapnel/receiver --path proto/google/rpc

generate: ## regenerate what is made of the protos
	$(TOOL) buf generate
	$(TOOL) buf build $(SHIPPED) -o proto/grapnel/v1/descriptors.binpb
	$(TOOL) buf build --path proto/grapnel/plugin --exclude-source-info -o plugins/example-python/plugin.binpb
	cp plugins/example-python/plugin.binpb plugins/example-ruby/
	cp proto/grapnel/plugin/v1/plugin.proto plugins/example-node/

baseline: ## promise the protos as they are: with a release, or when a rule has become wider in a way that only people see
	$(TOOL) buf build --path proto/grapnel --exclude-path proto/grapnel/store --exclude-source-info -o proto/baseline.binpb

lint: ## gofmt, vet, staticcheck, import directions
	test -z "$$(git ls-files '*.go' | xargs gofmt -l | tee /dev/stderr)"
	go vet ./...
	$(TOOL) staticcheck ./...
	go test .

protos: generate ## buf lint, format and breaking; generated code is up to date
	$(TOOL) buf lint
	$(TOOL) buf breaking --exclude-imports --against proto/baseline.binpb
	$(TOOL) buf format -d --exit-code --path proto/grapnel
	git diff --exit-code --stat -- proto plugins/example-python plugins/example-node plugins/example-ruby

cross: ## other systems compile
	GOOS=darwin go build ./...
	GOOS=windows go build ./...

deps: ## node packages for the tests that use them: official verifiers, the node examples
	for d in server/testdata/verifiers plugins/example-node docs/clients/node; do npm ci --prefix "$$d" --silent; done

ci: lint ## lint, a short race run of what runs in one process, and last the README's test command
	go test -race -short ./plugins/http/... ./sdk/client ./sdk/plugin $$(go list ./server/... | grep -v '/server$$')
	GOFLAGS=-timeout=20m go test ./... # a package that starts servers takes its time beside another on a small machine

suite: ## the plugin guide in all languages, and every case of the suite: on the examples in them, and on a plugin with one fault at a time
	go test ./cmd/grapnel -run PluginGuide -count=1 -timeout 20m -languages.all
	go test ./sdk/conformance -run 'OtherLanguages|EachFault' -count=1 -timeout 30m -languages.all -faults.each

check: cross lint protos race test suite ## all of it: also the builds for other systems, the protos, and everything under the race detector

demo: ## see what it does
	go run ./cmd/grapnel demo

clean: ## remove what was built
	rm -rf bin
