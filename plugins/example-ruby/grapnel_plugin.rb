# Grapnel's plugin protocol for Ruby: a signer, a transport or a transformer is one block.
#
# It needs the gems grpc and google-protobuf (Debian: ruby-grpc, ruby-google-protobuf) and the file plugin.binpb beside it,
# which is the compiled grapnel.plugin.v1. Copy both into your project; they change only with the protocol.
#
#     plugin = Grapnel::Plugin.new("acme/sign", "1.0.0")
#
#     plugin.signer("acme-v2", emits: ["acme-signature"], secrets: [Grapnel::Slot.new("key", required: true)]) do |config, secrets, target|
#       ->(request) { request.set("acme-signature", mac(secrets["key"].first, request.body)) }
#     end
#
#     plugin.main
#
# The block is called once for each configured instance, and when a config is only checked; what it returns is called for
# each request, on several threads. A signer is pure: it takes the time from request.created and randomness from
# request.nonce. A transformer is given an Event and returns Transformed, or raises Drop where nothing is to be sent; one that
# computes for long holds up the others, which share one interpreter. What an instance holds it gives back in a block that it
# hands to target.on_close.
require "google/protobuf"
require "google/protobuf/well_known_types"
require "grpc"
require "ipaddr"
require "json"
require "socket"
require "timeout"

module Grapnel
  MAGIC_COOKIE = ["GRAPNEL_PLUGIN", "b6f1c1a2-6b1e-4a57-9c0f-5d8f0e6a7c31"].freeze
  PROTOCOL_MINOR = 4
  MAX_MESSAGE = 32 << 20
  GRACE = 4.0 # seconds for work at hand once the host is gone
  WINDOW = 256 # attempts that a host sends at once over AttemptOne
  MAX_TRANSFORMED = 256 << 10
  PACKAGE = "grapnel.plugin.v1".freeze

  # POOL has the messages of grapnel.plugin.v1, made at start: no generated code to keep in step.
  POOL = Google::Protobuf::DescriptorPool.generated_pool
  set = File.binread(File.join(__dir__, "plugin.binpb"))
  until set.empty? # a FileDescriptorSet: field 1, its length in base 128, a file that begins with its name
    digits = set.byteslice(1..).bytes.slice_after { |b| b < 0x80 }.first
    file = set.byteslice(1 + digits.length, digits.each_with_index.sum { |b, i| (b & 0x7f) << (7 * i) })
    POOL.add_serialized_file(file) unless file.byteslice(2..).start_with?("google/protobuf/") # the library has those
    set = set.byteslice(1 + digits.length + file.bytesize..)
  end

  # MESSAGES are the classes by name, all of them: the library finds those of fields only once somebody has asked for them.
  MESSAGES = {}
  def self.learn(message)
    return if MESSAGES.key?(message.name)

    MESSAGES[message.name] = message.name.end_with?("Entry") ? nil : message.msgclass # entries of maps have none
    message.each { |field| learn(field.subtype) if field.type == :message }
  end
  %w[Describe Validate Configure Remove PrepareSecret Control Sign AttemptOne Transform].each do |call|
    %w[Request Response].each { |half| learn(POOL.lookup("#{PACKAGE}.#{call}#{half}")) }
  end

  # PB finds a message class by name.
  PB = ->(name) { MESSAGES.fetch("#{PACKAGE}.#{name}") }

  # Problem is a complaint about a config, for people. pointer is an RFC 6901 pointer such as /config/url.
  class Problem < StandardError
    attr_reader :pointer, :code, :warning

    def initialize(summary, pointer: "", code: "config.invalid", warning: false)
      super(summary)
      @pointer, @code, @warning = pointer, code, warning
    end
  end

  # Failure is an attempt that got no answer. source is :endpoint, :plugin or :policy; wire is :not_sent, :maybe_sent or
  # :sent and says what may have reached the receiver.
  class Failure < StandardError
    attr_reader :source, :code, :wire

    def initialize(source, code, message, wire = :maybe_sent)
      super(message)
      @source, @code, @wire = source, code, wire
    end
  end

  # Drop is raised by a transformer where nothing is to be sent; the reason is for people, and shown to them.
  class Drop < StandardError; end

  # Field is one setting of a kind: a String, Integer, Float or :bool.
  class Field
    attr_reader :name, :default, :required

    def initialize(name, type, doc: nil, default: nil, required: false, enum: nil, minimum: nil, maximum: nil)
      @name, @type, @doc, @default, @required = name, type, doc, default, required
      @enum, @minimum, @maximum = enum, minimum, maximum
    end

    def type_name = { String => "string", Integer => "integer", Float => "number", bool: "boolean" }.fetch(@type)

    def schema
      { type: type_name, description: @doc, default: @default, enum: @enum, minimum: @minimum, maximum: @maximum }.compact
    end

    # check raises a Problem.
    def check(value)
      fits = case @type
             when :bool then [true, false].include?(value)
             when Float then value.is_a?(Numeric)
             else value.is_a?(@type)
             end
      wrong("config.type", value, "a #{type_name}") unless fits
      wrong("config.enum", value, "one of #{@enum.join(', ')}") if @enum && !@enum.include?(value)
      wrong("config.range", value, "at least #{@minimum}") if @minimum && value < @minimum
      wrong("config.range", value, "at most #{@maximum}") if @maximum && value > @maximum
    end

    def pointer = "/config/#{Grapnel.escape(name)}"

    private

    def wrong(code, value, want)
      raise Problem.new("given #{JSON.generate(value)}, want #{want}", pointer: pointer, code: code)
    end
  end

  # Slot is one secret that a kind takes. With format, values are checked by read, which raises Problem and may return the
  # canonical form; with generate, which is given an algorithm, the server can make one.
  Slot = Struct.new(:name, :doc, :required, :format, :algorithms, :generate, :read) do
    def initialize(name, doc: "", required: false, format: "", algorithms: [], generate: nil, read: nil)
      super(name, doc, required, format, algorithms, generate, read)
    end
  end

  # Secret is the live versions of a secret, newest first. It prints as [redacted].
  class Secret < Array
    def inspect = "[redacted]"
    alias to_s inspect

    def to_json(*) = '"[redacted]"'
  end

  # Request is what is to be signed and sent. Headers are [name, value] with names in lower case; deadline is by
  # Grapnel.now.
  class Request
    attr_accessor :message_id, :event_type, :created, :nonce, :method, :url, :headers, :body, :deadline, :attempt_number,
                  :traceparent, :max_response_body, :ownership_check

    def get(name) = headers.assoc(name.downcase)&.last || ""

    def set(name, value)
      headers.reject! { |n, _| n == name.downcase }
      headers << [name.downcase, value.to_s]
    end
  end

  # Response is the receiver's answer; transports other than HTTP map theirs onto HTTP's status codes.
  Response = Struct.new(:status, :headers, :body, :peer)

  # Event is what a transformer makes something of, as it was published: data are bytes, time is in seconds, attributes are
  # by name; deadline is by Grapnel.now.
  Event = Struct.new(:message_id, :id, :source, :type, :subject, :time, :content_type, :data_schema, :attributes, :data, :deadline,
                     keyword_init: true) do
    # json is the payload, which may be none: then it raises, which fails the transformation.
    def json
      JSON.parse(data.dup.force_encoding(Encoding::UTF_8))
    rescue JSON::ParserError, EncodingError
      raise ArgumentError, "the payload is not JSON"
    end
  end

  # Transformed is what is sent instead of the payload: a body of 256 KiB at most, its media type, and headers as
  # [name, value].
  Transformed = Struct.new(:body, :content_type, :headers) do
    def initialize(body, content_type: "application/json", headers: [])
      super(body, content_type, headers)
    end
  end

  # Target is where an instance's requests go. egress says which addresses may be connected to.
  class Target
    attr_reader :method, :url, :headers, :egress, :user_agent

    def initialize(method, url, headers, egress, user_agent)
      @method, @url, @headers, @egress, @user_agent = method, url, headers, egress, user_agent
      @closers = []
    end

    # on_close has the block called at the end of the instance that is being built, the last given first: when it is
    # removed and its last attempt has ended, at once when it was built for a check alone, or when the process ends.
    def on_close(&block) = @closers << block

    def close
      while (closer = @closers.pop)
        begin
          closer.call
        rescue StandardError => e
          warn(e.full_message(highlight: false))
        end
      end
    end
  end

  # Egress: public addresses are open on ports 80, 443, 8080 and 8443; the server's allow list on every port, its deny list
  # never.
  class Egress
    SPECIAL = %w[
      0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
      192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 ::/16 64:ff9b::/96 64:ff9b:1::/48
      100::/64 2001::/23 2001:db8::/32 2002::/16 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8
    ].map { |range| IPAddr.new(range) }.freeze

    def initialize(allow = [], deny = [])
      @allow = allow.map { |range| IPAddr.new(range) }
      @deny = deny.map do |rule| # [range, port or 0]
        address, bits, port = rule.match(%r{\A([^/]*)/(\d+)(?::(\d+))?\z}).captures
        [IPAddr.new("#{address}/#{bits}"), port.to_i]
      end
    end

    def allows?(address, port)
      ip = IPAddr.new(address.split("%").first)
      ip = ip.native if ip.ipv4_mapped?
      within = ->(list) { list.any? { |range| range.family == ip.family && range.include?(ip) } }
      return false if within.(@deny.filter_map { |range, only| range if [0, port].include?(only) })

      within.(@allow) || ([80, 443, 8080, 8443].include?(port) && !within.(SPECIAL))
    end

    # connect returns a socket to an address that is allowed; the check is made on the address itself.
    def connect(host, port, deadline)
      begin
        found = Addrinfo.getaddrinfo(host, port, nil, :STREAM)
      rescue SocketError
        raise Failure.new(:endpoint, "dns", "the host name could not be looked up", :not_sent)
      end
      last = Failure.new(:policy, "egress", "blocked by egress policy", :not_sent)
      found.each do |address|
        next unless allows?(address.ip_address, port)

        begin
          return address.connect(timeout: [deadline - Grapnel.now, 0.001].max)
        rescue Errno::ETIMEDOUT
          last = Failure.new(:endpoint, "timeout", "no connection in time", :not_sent)
        rescue SystemCallError
          last = Failure.new(:endpoint, "connect", "no connection", :not_sent)
        end
      end
      raise last
    end
  end

  def self.now = Process.clock_gettime(Process::CLOCK_MONOTONIC)
  def self.escape(segment) = segment.gsub("~", "~0").gsub("/", "~1")
  def self.text(value) = value.to_s.dup.force_encoding(Encoding::UTF_8).scrub
  def self.pairs(headers) = headers.map { |h| [h.name.downcase, h.value] }
  def self.fields(headers) = headers.map { |n, v| PB["Header"].new(name: text(n).downcase, value: text(v)) }

  # redact cuts the values of secrets out of a text that leaves.
  def self.redact(message, values)
    values.map { |v| text(v) }.select { |v| v.length >= 6 }.reduce(text(message)) { |kept, v| kept.gsub(v, "[redacted]") }
  end

  Kind = Struct.new(:id, :role, :config, :secrets, :emits, :schemes, :doc, :example, :deterministic, :build, keyword_init: true) do
    def describe
      schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", type: "object", additionalProperties: false,
        properties: config.to_h { |f| [f.name, f.schema] }, required: config.select(&:required).map(&:name)
      }
      kind = PB["Kind"].new(
        id: id, description: doc, config_schema: JSON.generate(schema), config_example: JSON.generate(example),
        secret_slots: secrets.map do |s|
          PB["SecretSlot"].new(name: s.name, description: s.doc, required: s.required, format: s.format, algorithms: s.algorithms)
        end
      )
      case role
      when :signer then kind.signer = PB["SignerTraits"].new(emits_headers: emits, deterministic: deterministic)
      when :transport then kind.transport = PB["TransportTraits"].new(uri_schemes: schemes, may_add_headers: emits)
      else kind.transformer = PB["TransformerTraits"].new
      end
      kind
    end

    # read checks the shape of a config and fills in defaults; it returns the settings and what is wrong.
    def read(raw)
      given = begin
        raw.empty? ? {} : JSON.parse(raw.dup.force_encoding(Encoding::UTF_8), max_nesting: 1000)
      rescue JSON::ParserError, EncodingError
        return [nil, [Problem.new("the config is not JSON", pointer: "/config", code: "config.syntax")]]
      end
      return [nil, [Problem.new("want a JSON object", pointer: "/config", code: "config.type")]] unless given.is_a?(Hash)

      names = config.map(&:name)
      problems = (given.keys - names).map do |name|
        Problem.new("there is no field #{name.inspect}; there are #{names.empty? ? 'none' : names.join(', ')}",
                    pointer: "/config/#{Grapnel.escape(name)}", code: "config.unknown_field")
      end
      settings = config.to_h { |f| [f.name, given.fetch(f.name, f.default)] }
      config.each do |f|
        if given.key?(f.name)
          begin
            f.check(given[f.name])
          rescue Problem => e
            problems << e
          end
        elsif f.required
          problems << Problem.new("field #{f.name.inspect} is missing and required", pointer: f.pointer, code: "config.missing")
        end
      end
      [settings, problems]
    end
  end

  # Instance counts who is at work with it, so that it is closed once: when it is retired and nobody is.
  class Instance
    attr_reader :id, :target, :values

    def initialize(id, run, target, values)
      @id, @run, @target, @values = id, run, target, values
      @lock, @users, @retired = Mutex.new, 0, false
    end

    def use(request)
      @lock.synchronize { @users += 1 }
      @run.call(request)
    ensure
      @target.close if @lock.synchronize { (@users -= 1).zero? && @retired }
    end

    def retire
      over = @lock.synchronize do
        first = !@retired
        @retired = true
        first && @users.zero?
      end
      @target.close if over
    end
  end

  # Transforming is one call of Transform: a thread reads, each item has one of its own, and whoever asks for answers gets
  # what is ready, and a failure for what has had its time, whose thread ends with it.
  class Transforming
    def initialize(&transform)
      @transform, @lock, @changed = transform, Mutex.new, ConditionVariable.new
      @ready, @waiting, @over = [], {}, false # waiting: the item's deadline and thread by its number
    end

    def read(requests)
      Thread.new do
        requests.each { |request| request.items.each { |item| start(item, request.events[item.event]) } }
      rescue StandardError
        nil # the call is over
      ensure
        @lock.synchronize { @over = true and @changed.signal }
      end
    end

    # answers gives results to the block, until the host sends no more and all are answered.
    def answers
      while (results = take)
        yield results unless results.empty?
      end
    end

    private

    def start(item, event)
      deadline = Grapnel.now + (item.timeout_ms.positive? ? item.timeout_ms / 1000.0 : 15.0)
      @lock.synchronize do
        @waiting[item.seq] = [deadline, Thread.new { done(item.seq, @transform.call(item, event, deadline)) }]
        @changed.signal # its time may be over before others'
      end
    end

    def done(seq, result)
      @lock.synchronize do
        @ready << result if @waiting.delete(seq)
        @changed.signal
      end
    end

    def take
      @lock.synchronize do
        loop do
          now = Grapnel.now
          @waiting.select { |_, (deadline, _)| deadline <= now }.each do |seq, (_, thread)|
            @waiting.delete(seq)
            thread.kill
            @ready << PB["TransformResult"].new(seq: seq, failure: PB["Failure"].new(
              source: :SOURCE_PLUGIN, wire_state: :WIRE_STATE_NOT_SENT, code: "timeout", message: "the transformation took too long"
            ))
          end
          return @ready.shift(64) unless @ready.empty?
          return if @over && @waiting.empty?

          first = @waiting.each_value.map(&:first).min
          @changed.wait(@lock, first && [first - now, 0.001].max)
        end
      end
    end
  end

  # Plugin is a plugin process. Register kinds with signer, transport and transformer, then call main.
  class Plugin
    def initialize(name, version)
      @name, @version, @kinds = name, version, {}
      @lock, @instances, @newest = Mutex.new, {}, {}
      @egress, @agent, @in_flight = Egress.new, "grapnel", 0
      @host_seen = @host_gone = false
    end

    def signer(id, emits:, config: [], secrets: [], doc: "", example: {}, deterministic: true, &build)
      register(id: id, role: :signer, config: config, secrets: secrets, emits: emits.map(&:downcase), schemes: [], doc: doc,
               example: example, deterministic: deterministic, build: build)
    end

    def transport(id, schemes: [], config: [], secrets: [], adds: [], doc: "", example: {}, &build)
      register(id: id, role: :transport, config: config, secrets: secrets, emits: adds.map(&:downcase), schemes: schemes, doc: doc,
               example: example, deterministic: true, build: build)
    end

    def transformer(id, config: [], secrets: [], doc: "", example: {}, &build)
      register(id: id, role: :transformer, config: config, secrets: secrets, emits: [], schemes: [], doc: doc, example: example,
               deterministic: true, build: build)
    end

    # main serves until the host is gone, then exits the process.
    def main
      if ENV[MAGIC_COOKIE[0]] != MAGIC_COOKIE[1]
        warn "#{@name} #{@version}: this program is a Grapnel plugin and is started by the Grapnel server"
        exit!(1) # which does not wait for gRPC's threads
      end
      # The host says when to stop; a signal to the whole group must not cut its drain short.
      %w[TERM INT].each { |s| trap(s) { exit!(0) unless @host_seen } }
      path = File.join(ENV.fetch("PLUGIN_UNIX_SOCKET_DIR"), "plugin#{Process.pid}")
      server = GRPC::RpcServer.new(pool_size: WINDOW + 16, max_waiting_requests: WINDOW, server_args: {
        "grpc.max_receive_message_length" => MAX_MESSAGE, "grpc.max_send_message_length" => MAX_MESSAGE
      })
      server.add_http2_port("unix:#{path}", :this_port_is_insecure)
      services.each { |s| server.handle(s) }
      Thread.new { server.run }
      server.wait_till_running
      $stdout.syswrite("1|1|unix|#{path}|grpc|\n")
      $stdout.reopen($stderr) # standard output belonged to the handshake
      parent = Process.ppid
      sleep 0.1 until @host_gone || Process.ppid != parent
      finish
    end

    # The calls of the four services; each gives the answer to a message, or to a stream of them.

    def describe(_request, _call)
      roles = @kinds.values.map(&:role)
      capabilities = []
      capabilities << "sign.stream" if roles.include?(:signer)
      capabilities << "attempt.unary" if roles.include?(:transport)
      capabilities << "transform.stream" if roles.include?(:transformer)
      capabilities << "secret.prepare" if @kinds.values.any? { |k| k.secrets.any? { |s| !s.format.empty? } }
      PB["DescribeResponse"].new(name: @name, version: @version, protocol_minor: PROTOCOL_MINOR, capabilities: capabilities,
                                 kinds: @kinds.values.map(&:describe))
    end

    def validate(request, _call)
      instance, problems = build(request.instance, validate: true)
      instance&.retire
      PB["ValidateResponse"].new(diagnostics: diagnostics(problems, secret_values(request.instance)))
    end

    def configure(request, _call)
      @lock.synchronize do
        if (set = request.settings)
          @egress, @agent = Egress.new(set.egress_allow.to_a, set.egress_deny.to_a), set.user_agent
        end
        statuses = request.instances.map do |given|
          newest, refs = @newest.fetch(given.id, [0, []])
          if given.generation < newest
            problems = [Problem.new("generation #{given.generation} is older than #{newest}", code: "config.stale")]
          else
            instance, problems = build(given, validate: false)
            if instance
              @instances[given.ref]&.retire
              @instances[given.ref] = instance
              @newest[given.id] = [given.generation, refs | [given.ref]]
            end
          end
          PB["InstanceStatus"].new(ref: given.ref, diagnostics: diagnostics(problems, secret_values(given)))
        end
        PB["ConfigureResponse"].new(statuses: statuses)
      end
    end

    def remove(request, _call)
      @lock.synchronize do
        request.refs.each do |ref|
          next unless (gone = @instances.delete(ref))

          gone.retire
          _, refs = @newest[gone.id]
          refs.delete(ref)
          @newest.delete(gone.id) if refs.empty?
        end
      end
      PB["RemoveResponse"].new
    end

    def prepare_secret(request, _call)
      value = request.value
      slot = @kinds[request.kind]&.secrets&.find { |s| s.name == request.slot }
      raise Problem.new("there is no kind #{request.kind.inspect}", code: "secret.unknown_kind") unless @kinds[request.kind]
      raise Problem.new("there is no secret slot #{request.slot.inspect}", code: "secret.unknown_slot") unless slot

      if value.empty?
        raise Problem.new("a value must be given: none can be made", pointer: "/value", code: "secret.required") unless slot.generate

        algorithm = request.algorithm.empty? ? slot.algorithms.first : request.algorithm
        unless slot.algorithms.include?(algorithm)
          raise Problem.new("given #{algorithm.inspect}, want one of #{slot.algorithms.join(', ')}", pointer: "/algorithm", code: "secret.algorithm")
        end
        value = slot.generate.call(algorithm)
      end
      begin
        canonical = slot.read&.call(value)
        value = canonical if canonical.is_a?(String)
      rescue Problem => e
        raise Problem.new(e.message, pointer: "/value", code: "secret.malformed")
      end
      PB["PrepareSecretResponse"].new(value: value.b)
    rescue Problem => e
      PB["PrepareSecretResponse"].new(diagnostics: diagnostics([e], [request.value]))
    end

    def control(frames, _call)
      @host_seen = true
      Enumerator.new do |out|
        frames.each do |frame|
          next unless frame.heartbeat

          out << PB["ControlResponse"].new(heartbeat: PB["Heartbeat"].new(number: frame.heartbeat.number, in_flight: @in_flight))
        end
      ensure
        @host_gone = true
      end
    end

    def sign(requests, _call)
      Enumerator.new do |out|
        requests.each do |request|
          out << PB["SignResponse"].new(results: request.items.map { |item| sign_item(request.contents, item) })
        end
      end
    end

    def transform(requests, _call)
      work = Transforming.new { |item, event, deadline| transform_item(item, event, deadline) }
      work.read(requests)
      Enumerator.new { |out| work.answers { |results| out << PB["TransformResponse"].new(results: results) } }
    end

    def attempt_one(request, _call)
      began = Grapnel.now
      result = PB["AttemptResult"].new(seq: request.attempt.seq)
      values = []
      @lock.synchronize { @in_flight += 1 }
      begin
        attempt(request, result, values)
      rescue Failure => e
        result.failure = failure(e, values)
      rescue StandardError => e
        warn(Grapnel.redact(e.full_message(highlight: false), values))
        result.failure = failure(Failure.new(:plugin, "panic", "the plugin failed: #{e.class}"), values)
      ensure
        @lock.synchronize { @in_flight -= 1 }
      end
      result.total_us = ((Grapnel.now - began) * 1e6).to_i
      PB["AttemptOneResponse"].new(result: result)
    end

    private

    def register(**kind)
      raise ArgumentError, "kind #{kind[:id]}: the id must match ^[a-z][a-z0-9-]{0,62}$" unless kind[:id].match?(/\A[a-z][a-z0-9-]{0,62}\z/)

      @kinds[kind[:id]] = Kind.new(**kind)
    end

    # services are what gRPC is to serve, each a class made of its calls.
    def services
      calls = {
        "PluginService" => [%w[Describe], %w[Validate], %w[Configure], %w[Remove], %w[PrepareSecret], %w[Control stream]],
        "SignerService" => [%w[Sign stream]], "TransportService" => [%w[AttemptOne]],
        "TransformerService" => [%w[Transform stream]]
      }
      calls.map do |service, methods|
        plugin = self
        Class.new do
          include GRPC::GenericService
          self.marshal_class_method = :encode
          self.unmarshal_class_method = :decode
          self.service_name = "#{PACKAGE}.#{service}"
          methods.each do |name, streams|
            given, answer = PB["#{name}Request"], PB["#{name}Response"]
            streams ? rpc(name.to_sym, stream(given), stream(answer)) : rpc(name.to_sym, given, answer)
            call = GRPC::GenericService.underscore(name).to_sym
            define_method(call) { |request, context| plugin.public_send(call, request, context) }
          end
        end
      end
    end

    # finish lets work at hand end.
    def finish
      deadline = Grapnel.now + GRACE
      sleep 0.02 while @in_flight.positive? && Grapnel.now < deadline
      @instances.values.each(&:retire)
      $stderr.flush
      exit!(0)
    end

    def build(given, validate:)
      kind = @kinds[given.kind]
      return [nil, [Problem.new("#{@name} offers no kind #{given.kind.inspect}", code: "config.unknown_kind")]] unless kind

      config, problems = kind.read(given.config_json)
      names = kind.secrets.map(&:name)
      given.secrets.to_h.each_key do |name|
        next if names.include?(name)

        problems << Problem.new("there is no secret slot #{name.inspect}; there are #{names.empty? ? 'none' : names.join(', ')}",
                                pointer: "/secrets/#{Grapnel.escape(name)}", code: "secret.unknown_slot")
      end
      secrets, shape_only = {}, false
      kind.secrets.each do |slot|
        live = live_values(given.secrets[slot.name])
        at = "/secrets/#{Grapnel.escape(slot.name)}"
        if slot.required && live.empty?
          shape_only ||= validate
          problems << Problem.new("secret slot #{slot.name.inspect} is empty and required", pointer: at, code: "secret.missing") unless validate
        end
        live.each do |value|
          slot.read&.call(value)
        rescue Problem => e
          problems << Problem.new(e.message, pointer: at, code: "secret.malformed")
        end
        secrets[slot.name] = live
      end
      return [nil, problems] if shape_only || problems.any? { |p| !p.warning }

      to = given.target || PB["Target"].new
      target = Target.new(to["method"], to.uri, Grapnel.pairs(to.headers), @egress, @agent)
      begin
        [Instance.new(given.id, kind.build.call(config, secrets, target), target, secret_values(given)), problems]
      rescue Problem => e
        target.close
        [nil, problems << e]
      rescue StandardError => e
        target.close
        warn(Grapnel.redact(e.full_message(highlight: false), secret_values(given)))
        [nil, problems << Problem.new("the plugin failed on this config", code: "panic")]
      end
    end

    def live_values(versions)
      now = Time.now.to_i
      Secret.new((versions&.versions || []).select { |v| v.expire_time.nil? || v.expire_time.seconds > now }.map(&:value))
    end

    def secret_values(instance) = instance ? instance.secrets.to_h.values.flat_map { |s| versions_of(s) } : []

    def versions_of(secret) = secret.is_a?(Hash) ? secret[:versions].map { |v| v[:value] } : secret.versions.map(&:value)

    def diagnostics(problems, values)
      problems.map do |p|
        PB["Diagnostic"].new(severity: p.warning ? :SEVERITY_WARNING : :SEVERITY_ERROR, code: p.code, pointer: Grapnel.text(p.pointer),
                             summary: Grapnel.redact(p.message, values))
      end
    end

    def sign_item(contents, item)
      result = PB["SignResult"].new(seq: item.seq)
      instance = @instances[item.instance_ref]
      values = []
      raise stale(item.instance_ref) unless instance
      raise Failure.new(:plugin, "protocol", "no such content", :not_sent) if item.content >= contents.length

      values = instance.values
      r = request(instance, contents[item.content], item)
      r.created = item.created.seconds + item.created.nanos / 1e9
      url, before = r.url, r.headers.length
      signed(instance, r)
      Grapnel.fields(r.headers.drop(before)).each { |h| result.headers << h }
      result.uri = r.url unless r.url == url
      result
    rescue Failure => e
      result.failure = failure(e, values)
      result
    end

    def transform_item(item, event, deadline)
      result = PB["TransformResult"].new(seq: item.seq)
      values = []
      instance = @instances[item.instance_ref] or raise stale(item.instance_ref)
      raise Failure.new(:plugin, "protocol", "no such event", :not_sent) unless event

      values = instance.values
      at = event.time ? event.time.seconds + event.time.nanos / 1e9 : 0.0
      made = instance.use(Event.new(
        message_id: event.message_id, id: event.id, source: event.source, type: event.type, subject: event.subject, time: at, content_type: event.content_type,
        data_schema: event.data_schema, attributes: event.attributes.to_h, data: event.data, deadline: deadline
      ))
      body = made.body.b
      raise ArgumentError, "the body has #{body.bytesize} bytes; at most #{MAX_TRANSFORMED} can be sent" if body.bytesize > MAX_TRANSFORMED

      result.transformed = PB["Transformed"].new(body: body, content_type: made.content_type, headers: Grapnel.fields(made.headers))
      result
    rescue Drop => e # its message is its class where none was given
      result.dropped = PB["Dropped"].new(reason: Grapnel.redact(e.message, values))
      result
    rescue Failure => e
      source = e.source == :config ? :config : :plugin
      result.failure = failure(Failure.new(source, e.code, e.message, :not_sent), values)
      result
    rescue StandardError, SystemStackError => e
      text = e.is_a?(ArgumentError) ? e.message : "#{e.class}: #{e.message}"
      result.failure = failure(Failure.new(:plugin, "transform", text, :not_sent), values)
      result
    end

    def attempt(call, result, values)
      a = call.attempt
      instance = @instances[a.instance_ref] or raise stale(a.instance_ref)
      values.concat(instance.values)
      r = request(instance, call.content, a)
      timeout = a.timeout_ms.positive? ? a.timeout_ms / 1000.0 : 15.0
      r.created, r.deadline = a.created_unix_nano / 1e9, Grapnel.now + timeout
      r.attempt_number, r.traceparent = a.attempt_number, a.traceparent
      r.max_response_body, r.ownership_check = call.max_response_body, a.ownership_check
      before = r.headers.length - a.headers.length
      a.sign_here.each do |ref|
        signer = @instances[ref] or raise stale(ref)
        values.concat(signer.values)
        signed(signer, r)
      end
      # On a thread of its own: an attempt that overstays its time costs itself, not the process.
      work = Thread.new { instance.use(r) }
      work.report_on_exception = false
      raise Failure.new(:endpoint, "timeout", "no answer in time") unless work.join(timeout + 0.25)

      answer = work.value
      ok = answer.status.between?(200, 299)
      unless ok
        added = r.headers.drop(before).reject { |n, _| n.match?(/authorization|cookie|token|secret|password|api-?key/) }
        Grapnel.fields(added).each { |h| result.sent_headers << h }
      end
      result.peer = answer.peer.to_s
      result.response = PB["Response"].new(
        status: answer.status, headers: Grapnel.fields(answer.headers.select { |n, _| !ok || a.ownership_check || n.downcase == "retry-after" }),
        body: answer.body.byteslice(0, r.max_response_body).b, body_truncated: answer.body.bytesize > r.max_response_body
      )
    end

    def request(instance, content, item)
      r = Request.new
      r.message_id, r.event_type, r.body = content.message_id, content.event_type, content.body
      r.method, r.url, r.nonce = instance.target.method, item.uri.empty? ? instance.target.url : item.uri, item.nonce
      r.headers = Grapnel.pairs(content.headers)
      instance.target.headers.each { |n, v| r.set(n, v) }
      r.headers.concat(Grapnel.pairs(item.headers))
      r
    end

    def signed(signer, request)
      signer.use(request)
    rescue StandardError => e
      raise Failure.new(:plugin, "sign", e.message, :not_sent)
    end

    def stale(ref) = Failure.new(:config, "config", "no instance with ref #{ref}", :not_sent)

    def failure(problem, values)
      PB["Failure"].new(
        source: { endpoint: :SOURCE_ENDPOINT, plugin: :SOURCE_PLUGIN, policy: :SOURCE_POLICY, config: :SOURCE_CONFIG }.fetch(problem.source),
        wire_state: { not_sent: :WIRE_STATE_NOT_SENT, maybe_sent: :WIRE_STATE_MAYBE_SENT, sent: :WIRE_STATE_SENT }.fetch(problem.wire),
        code: problem.code, message: Grapnel.redact(problem.message, values)
      )
    end
  end
end
