// Command ttrpc_go is containerd's own ttrpc, as the peer of test_ttrpc_go.py.
//
//	ttrpc_go serve SOCKET    serves ttrpc.integration.streaming.Streaming
//	ttrpc_go call SOCKET     calls every method of it, a line of JSON per answer
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/containerd/ttrpc/integration/streaming"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

func main() {
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(os.Args[2])
	case "call":
		err = call(os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type service struct{}

func serve(path string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	pb.RegisterTTRPCStreamingService(server, service{})
	fmt.Println("serving")
	return server.Serve(context.Background(), listener)
}

// Echo does what the message says.
func (service) Echo(ctx context.Context, request *pb.EchoPayload) (*pb.EchoPayload, error) {
	switch request.Msg {
	case "refuse":
		return nil, status.Error(codes.FailedPrecondition, "not now")
	case "big":
		return &pb.EchoPayload{Msg: strings.Repeat("x", int(request.Seq))}, nil
	case "metadata":
		metadata, _ := ttrpc.GetMetadata(ctx)
		pairs := []string{}
		for key, values := range metadata {
			pairs = append(pairs, key+"="+strings.Join(values, "+"))
		}
		sort.Strings(pairs)
		return &pb.EchoPayload{Msg: strings.Join(pairs, " ")}, nil
	case "timeout":
		deadline, ok := ctx.Deadline()
		if !ok {
			return &pb.EchoPayload{Msg: "none"}, nil
		}
		return &pb.EchoPayload{Seq: uint32(math.Ceil(time.Until(deadline).Seconds()))}, nil
	case "sleep":
		<-ctx.Done()
		fmt.Println("sleeper:", ctx.Err())
		return nil, ctx.Err()
	}
	return request, nil
}

func (service) EchoStream(ctx context.Context, stream pb.TTRPCStreaming_EchoStreamServer) error {
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if message.Msg == "refuse" {
			return status.Error(codes.DataLoss, "enough")
		}
		message.Seq++
		if err := stream.Send(message); err != nil {
			return err
		}
	}
}

func (service) SumStream(ctx context.Context, stream pb.TTRPCStreaming_SumStreamServer) (*pb.Sum, error) {
	sum := &pb.Sum{}
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return sum, nil
		}
		if err != nil {
			return nil, err
		}
		sum.Sum += part.Add
		sum.Num++
	}
}

func (service) DivideStream(ctx context.Context, sum *pb.Sum, stream pb.TTRPCStreaming_DivideStreamServer) error {
	for left := sum.Num; left > 0; left-- {
		if err := stream.Send(&pb.Part{Add: sum.Sum / sum.Num}); err != nil {
			return err
		}
	}
	return nil
}

func (service) EchoNull(ctx context.Context, stream pb.TTRPCStreaming_EchoNullServer) (*emptypb.Empty, error) {
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			return &emptypb.Empty{}, nil
		} else if err != nil {
			return nil, err
		}
	}
}

func (service) EchoNullStream(ctx context.Context, stream pb.TTRPCStreaming_EchoNullStreamServer) error {
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := stream.Send(&emptypb.Empty{}); err != nil {
			return err
		}
	}
}

func (service) EmptyPayloadStream(ctx context.Context, _ *emptypb.Empty, stream pb.TTRPCStreaming_EmptyPayloadStreamServer) error {
	for seq := uint32(0); seq < 3; seq++ {
		if err := stream.Send(&pb.EchoPayload{Seq: seq}); err != nil {
			return err
		}
	}
	return nil
}

func call(path string) error {
	connection, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	raw := ttrpc.NewClient(connection)
	defer raw.Close()
	client := pb.NewTTRPCStreamingClient(raw)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	answers := json.NewEncoder(os.Stdout)
	tell := func(what string, answer any, err error) {
		line := map[string]any{"what": what, "answer": answer}
		if err != nil {
			line["answer"] = nil
			line["code"] = status.Code(err).String()
			line["error"] = status.Convert(err).Message()
		}
		answers.Encode(line)
	}
	echo := func(what string, ctx context.Context, request *pb.EchoPayload) {
		answer, err := client.Echo(ctx, request)
		tell(what, len(answer.GetMsg())+int(answer.GetSeq()), err)
	}

	echo("echo", ctx, &pb.EchoPayload{Seq: 7, Msg: "hello"})
	echo("echo empty", context.Background(), &pb.EchoPayload{})
	echo("echo 1 MiB", ctx, &pb.EchoPayload{Msg: strings.Repeat("x", 1<<20)})
	echo("refuse", ctx, &pb.EchoPayload{Msg: "refuse"})
	echo("crash", ctx, &pb.EchoPayload{Msg: "crash"})
	echo("answer over the limit", ctx, &pb.EchoPayload{Msg: "big", Seq: 5 << 20})
	echo("request over the limit", ctx, &pb.EchoPayload{Msg: strings.Repeat("x", 5<<20)})

	metadata := ttrpc.WithMetadata(ctx, ttrpc.MD{"a": {"1", "2"}, "b": {"x"}})
	answer, err := client.Echo(metadata, &pb.EchoPayload{Msg: "metadata"})
	tell("metadata", answer.GetMsg(), err)
	minute, stop := context.WithTimeout(ctx, time.Minute)
	answer, err = client.Echo(minute, &pb.EchoPayload{Msg: "timeout"})
	tell("timeout", answer.GetSeq(), err)
	stop()
	tell("unknown method", nil, raw.Call(ctx, "ttrpc.integration.streaming.Streaming", "Nothing", &pb.Sum{}, &pb.Sum{}))
	tell("unknown service", nil, raw.Call(ctx, "no.Such", "Echo", &pb.Sum{}, &pb.Sum{}))
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	_, err = client.Echo(short, &pb.EchoPayload{Msg: "sleep"})
	tell("sleep", nil, err)
	stop()

	var seqs []uint32
	first, err := client.EchoStream(ctx)
	if err != nil {
		return err
	}
	second, err := client.EchoStream(ctx)
	if err != nil {
		return err
	}
	for n := uint32(0); n < 50; n++ {
		for _, stream := range []pb.TTRPCStreaming_EchoStreamClient{first, second} {
			if err := stream.Send(&pb.EchoPayload{Seq: n}); err != nil {
				return err
			}
		}
	}
	for n := 0; n < 50; n++ {
		for _, stream := range []pb.TTRPCStreaming_EchoStreamClient{second, first} {
			message, err := stream.Recv()
			if err != nil {
				return err
			}
			seqs = append(seqs, message.Seq)
		}
	}
	if err := first.CloseSend(); err != nil {
		return err
	}
	_, err = first.Recv()
	tell("two streams side by side", seqs, nil)
	tell("end of stream", errors.Is(err, io.EOF), nil)
	if err := second.Send(&pb.EchoPayload{Msg: "refuse"}); err != nil {
		return err
	}
	_, err = second.Recv()
	tell("stream refused", nil, err)

	sums, err := client.SumStream(ctx)
	if err != nil {
		return err
	}
	for n := int32(0); n <= 100; n++ {
		if err := sums.Send(&pb.Part{Add: n}); err != nil {
			return err
		}
	}
	sum, err := sums.CloseAndRecv()
	tell("sum", []int32{sum.GetSum(), sum.GetNum()}, err)

	parts, err := client.DivideStream(ctx, &pb.Sum{Sum: 60, Num: 4})
	if err != nil {
		return err
	}
	var adds []int32
	for {
		part, err := parts.Recv()
		if err != nil {
			tell("end of parts", errors.Is(err, io.EOF), nil)
			break
		}
		adds = append(adds, part.Add)
	}
	tell("divide", adds, nil)

	nulls, err := client.EchoNullStream(ctx)
	if err != nil {
		return err
	}
	for n := 0; n < 3; n++ {
		if err := nulls.Send(&pb.EchoPayload{}); err != nil {
			return err
		}
		if _, err := nulls.Recv(); err != nil {
			return err
		}
	}
	err = nulls.CloseSend()
	tell("empty messages both ways", "ok", err)

	null, err := client.EchoNull(ctx)
	if err != nil {
		return err
	}
	if err := null.Send(&pb.EchoPayload{Seq: 1}); err != nil {
		return err
	}
	_, err = null.CloseAndRecv()
	tell("empty answer to a stream", "ok", err)

	empty, err := client.EmptyPayloadStream(ctx, &emptypb.Empty{})
	if err != nil {
		return err
	}
	count := 0
	for {
		if _, err := empty.Recv(); err != nil {
			break
		}
		count++
	}
	tell("stream of an empty request", count, nil)
	return nil
}
