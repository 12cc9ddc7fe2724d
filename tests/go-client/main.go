// A client of Bulkhead's API in Go: containerd's ttrpc, with generated code. It makes a machine that is never booted,
// and prints a line for each thing that it finds right or wrong.
// usage: client API-SOCKET KERNEL DISK SWITCH-SOCKET
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"bulkhead/machine"

	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// A bound for what must not hang; nothing here is judged by how fast it is.
const patience = 60 * time.Second

type client struct {
	connection *ttrpc.Client
	machine.MachineClient
}

func dial(socket string) (*client, error) {
	connection, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	c := ttrpc.NewClient(connection)
	return &client{c, machine.NewMachineClient(c)}, nil
}

type test struct {
	socket, kernel, disk, switchSocket string
	// The operation by which a device was added.
	added uint64
	api   *client
}

func within(limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), limit)
}

// An error of this code whose message has these words.
func refused(err error, code codes.Code, words ...string) error {
	if status.Code(err) != code {
		return fmt.Errorf("%v is not answered, but: %v", code, err)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			return fmt.Errorf("%q does not name %q", err, word)
		}
	}
	return nil
}

func (t *test) state(want machine.State) error {
	ctx, cancel := within(patience)
	defer cancel()
	info, err := t.api.Info(ctx, &machine.InfoRequest{})
	if err == nil && info.State != want {
		err = fmt.Errorf("the state is %v, not %v", info.State, want)
	}
	return err
}

func (t *test) config() *machine.MachineConfig {
	return &machine.MachineConfig{
		Kernel:       t.kernel,
		MemoryBytes:  256 << 20,
		Cpus:         &machine.CpuConfig{Boot: 1},
		Disks:        []*machine.DiskConfig{{Id: "root", Path: t.disk}},
		HotplugPorts: []string{"hp1"},
	}
}

func (t *test) create(limit time.Duration, config *machine.MachineConfig) error {
	ctx, cancel := within(limit)
	defer cancel()
	_, err := t.api.Create(ctx, &machine.CreateRequest{Config: config})
	return err
}

func (t *test) unary() error {
	return t.state(machine.State_STATE_NONE)
}

func (t *test) unknownMethod() error {
	ctx, cancel := within(patience)
	defer cancel()
	err := t.api.connection.Call(ctx, "bulkhead.v1.Machine", "Fly", &machine.InfoRequest{}, &machine.InfoResponse{})
	return refused(err, codes.Unimplemented)
}

func (t *test) wrongField() error {
	config := t.config()
	config.Cpus.Boot = 0
	return refused(t.create(patience, config), codes.InvalidArgument, "config.cpus.boot")
}

// A machine that needs a switch which does not come is made for seconds: the caller waits for less.
func (t *test) deadline() error {
	config := t.config()
	backend := &machine.VhostUserBackend{Socket: t.switchSocket, Server: true}
	config.Nets = []*machine.NetConfig{{Id: "net0", Queues: 1, Backend: &machine.NetConfig_VhostUser{VhostUser: backend}}}
	err := t.create(300*time.Millisecond, config)
	if !errors.Is(err, context.DeadlineExceeded) && status.Code(err) != codes.DeadlineExceeded {
		return fmt.Errorf("no deadline: %v", err)
	}
	// Others are answered meanwhile, and another machine can be made once this one has come to nothing.
	if err := t.state(machine.State_STATE_NONE); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		err := t.create(patience, t.config())
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

func (t *test) many() error {
	var group sync.WaitGroup
	failed := make(chan error, 20)
	for range 20 {
		group.Add(1)
		go func() {
			defer group.Done()
			for range 20 {
				if err := t.state(machine.State_STATE_CREATED); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	group.Wait()
	close(failed)
	return <-failed
}

// Events from a number on, until one of this kind.
func (c *client) until(from uint64, kind string) ([]*machine.Event, error) {
	ctx, cancel := within(patience)
	defer cancel()
	stream, err := c.Events(ctx, &machine.EventsRequest{From: from})
	if err != nil {
		return nil, err
	}
	var events []*machine.Event
	for {
		event, err := stream.Recv()
		if err != nil {
			return events, fmt.Errorf("after %d events, without %s: %w", len(events), kind, err)
		}
		events = append(events, event)
		if event.Kind == kind {
			return events, nil
		}
	}
}

func (t *test) replay() error {
	seen := make(chan error, 1)
	var watched []*machine.Event
	go func() {
		var err error
		watched, err = t.api.until(0, "operation.done")
		seen <- err
	}()
	ctx, cancel := within(patience)
	defer cancel()
	rng := &machine.AddDeviceRequest_Rng{Rng: &machine.RngConfig{Id: "more"}}
	added, err := t.api.AddDevice(ctx, &machine.AddDeviceRequest{Device: rng})
	if err != nil {
		return err
	}
	t.added = added.Operation
	if err := <-seen; err != nil {
		return err
	}
	for i, event := range watched {
		if event.Sequence != watched[0].Sequence+uint64(i) {
			return fmt.Errorf("event %d has the number %d", i, event.Sequence)
		}
	}
	// Another connection that missed the second half.
	other, err := dial(t.socket)
	if err != nil {
		return err
	}
	defer other.connection.Close()
	half := watched[len(watched)/2:]
	again, err := other.until(half[0].Sequence, "operation.done")
	if err != nil {
		return err
	}
	if len(again) != len(half) {
		return fmt.Errorf("%d events at first, %d again", len(half), len(again))
	}
	for i := range half {
		if !proto.Equal(half[i], again[i]) {
			return fmt.Errorf("%v at first, %v again", half[i], again[i])
		}
	}
	return nil
}

func (t *test) backlog() error {
	ctx, cancel := within(patience)
	defer cancel()
	stream, err := t.api.Events(ctx, &machine.EventsRequest{BacklogOnly: true})
	for err == nil {
		_, err = stream.Recv()
	}
	if err != io.EOF {
		return fmt.Errorf("the stream does not end well: %w", err)
	}
	return nil
}

// A call that is given up does not keep the connection from carrying others.
// Who cancels may be answered before: the client takes what comes first.
func (t *test) cancelledCall() error {
	cancelled := 0
	for range 40 {
		ctx, cancel := within(patience)
		cancel()
		_, err := t.api.Info(ctx, &machine.InfoRequest{})
		switch {
		case errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled:
			cancelled++
		case err != nil:
			return fmt.Errorf("not cancelled, but: %w", err)
		}
	}
	if cancelled == 0 {
		return errors.New("none of them was cancelled")
	}
	return t.state(machine.State_STATE_CREATED)
}

// A watch that is cancelled ends with its connection: nobody reads what ttrpc for Go receives for it, which would hold
// up the others of that connection.
func (t *test) cancelledWatch() error {
	for range 40 {
		watcher, err := dial(t.socket)
		if err != nil {
			return err
		}
		ctx, cancel := within(patience)
		stream, err := watcher.Events(ctx, &machine.EventsRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		cancel()
		for err == nil {
			_, err = stream.Recv()
		}
		watcher.connection.Close()
		if !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
			return fmt.Errorf("not cancelled, but: %w", err)
		}
	}
	return t.state(machine.State_STATE_CREATED)
}

func (t *test) vanish() error {
	for range 40 {
		gone, err := dial(t.socket)
		if err != nil {
			return err
		}
		ctx, cancel := within(patience)
		if _, err := gone.Events(ctx, &machine.EventsRequest{}); err != nil {
			cancel()
			return err
		}
		gone.connection.Close()
		cancel()
	}
	return t.state(machine.State_STATE_CREATED)
}

func attach(console *machine.ConsoleAttach) *machine.ConsoleInput {
	return &machine.ConsoleInput{What: &machine.ConsoleInput_Attach{Attach: console}}
}

// A stream in both directions: of the serial port, which prints nothing before the machine boots, and of one that is
// not there.
func (t *test) console() error {
	terminal, err := dial(t.socket)
	if err != nil {
		return err
	}
	defer terminal.connection.Close()
	ctx, cancel := within(patience)
	defer cancel()
	stream, err := terminal.AttachConsole(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(attach(&machine.ConsoleAttach{})); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil || len(first.Printed) > 0 {
		return fmt.Errorf("at first comes %v: %v", first, err)
	}
	typed := &machine.ConsoleInput{What: &machine.ConsoleInput_Typed{Typed: []byte("ls\n")}}
	for range 5 {
		if err := stream.Send(typed); err != nil {
			return err
		}
	}
	wrong, err := terminal.AttachConsole(ctx)
	if err != nil {
		return err
	}
	if err := wrong.Send(attach(&machine.ConsoleAttach{Port: 1})); err != nil {
		return err
	}
	_, err = wrong.Recv()
	if err := refused(err, codes.InvalidArgument, "port is 1"); err != nil {
		return err
	}
	return t.state(machine.State_STATE_CREATED)
}

// What became of the device that was added, with a wait and without.
func (t *test) operation() error {
	ctx, cancel := within(patience)
	defer cancel()
	for _, wait := range []uint32{0, 600000} {
		one, err := t.api.Operation(ctx, &machine.OperationRequest{Operation: t.added, WaitMs: wait})
		if err != nil {
			return err
		}
		if one.State != machine.OperationInfo_DONE || one.Subject != "more" {
			return fmt.Errorf("not done: %v", one)
		}
	}
	all, err := t.api.Operations(ctx, &machine.OperationsRequest{Subject: "more"})
	if err != nil || len(all.Operations) != 1 || all.Operations[0].Operation != t.added {
		return fmt.Errorf("not listed: %v: %v", all, err)
	}
	_, err = t.api.Operation(ctx, &machine.OperationRequest{Operation: t.added + 1})
	if err := refused(err, codes.NotFound, "there has been no operation"); err != nil {
		return err
	}
	_, err = t.api.Operation(ctx, &machine.OperationRequest{Operation: 1, WaitMs: 600001})
	return refused(err, codes.InvalidArgument, "wait_ms")
}

// A machine that has not booted is given up, as often as one likes, and another one is made.
func (t *test) delete() error {
	// The watches of before still send to their connection, where nobody reads.
	t.api.connection.Close()
	var err error
	if t.api, err = dial(t.socket); err != nil {
		return err
	}
	ctx, cancel := within(patience)
	defer cancel()
	for range 2 {
		if _, err := t.api.Delete(ctx, &machine.DeleteRequest{}); err != nil {
			return err
		}
		if err := t.state(machine.State_STATE_NONE); err != nil {
			return err
		}
	}
	if err := t.create(patience, t.config()); err != nil {
		return err
	}
	return t.state(machine.State_STATE_CREATED)
}

func (t *test) shutdown() error {
	ctx, cancel := within(patience)
	defer cancel()
	_, err := t.api.Shutdown(ctx, &machine.ShutdownRequest{Force: true})
	return err
}

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: client API-SOCKET KERNEL DISK SWITCH-SOCKET")
		os.Exit(2)
	}
	t := &test{socket: os.Args[1], kernel: os.Args[2], disk: os.Args[3], switchSocket: os.Args[4]}
	var err error
	if t.api, err = dial(t.socket); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
	// It tells of every message that nobody waits for any more.
	logrus.SetOutput(io.Discard)
	passed, failed := 0, 0
	for _, one := range []struct {
		name string
		run  func() error
	}{
		{"a unary call is answered", t.unary},
		{"an unknown method is UNIMPLEMENTED", t.unknownMethod},
		{"a wrong field is INVALID_ARGUMENT and named", t.wrongField},
		{"a deadline passes while a machine is made, and others are answered meanwhile", t.deadline},
		{"20 goroutines call over one connection", t.many},
		{"a watch from a number on brings the same events again, to another connection, too", t.replay},
		{"a watch of the backlog ends", t.backlog},
		{"40 calls are cancelled, and the connection serves on", t.cancelledCall},
		{"40 watches are cancelled", t.cancelledWatch},
		{"40 watchers vanish", t.vanish},
		{"an operation is asked for by its number", t.operation},
		{"a console is attached to, typed at, and refused by name", t.console},
		{"the machine is given up and made anew", t.delete},
		{"the machine is ended", t.shutdown},
	} {
		if err := one.run(); err != nil {
			failed++
			fmt.Printf("FAILED  %s: %v\n", one.name, err)
		} else {
			passed++
			fmt.Printf("ok      %s\n", one.name)
		}
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 {
		os.Exit(1)
	}
}
