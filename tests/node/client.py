"""An NBD client that a test steers: libnbd, one command a line on stdin, one answer a line on stdout.

    client.py URI                    read OFFSET LENGTH / write OFFSET LENGTH NUMBER / flush / trim OFFSET LENGTH
    client.py --crowd URI COUNT OFFSET LENGTH
                                     COUNT connections send the same read before any answer is looked at

A read answers "ok HEX", anything else "ok"; an error answers "error ERRNO". What `write` writes is the number, as 8 bytes
little endian, repeated. Several commands may be sent before the first answer: they are done in turn.
"""

import sys

import nbd


def connect(uri):
    handle = nbd.NBD()
    # The server's own refusals are wanted, not the library's.
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def do(handle, command, numbers):
    if command == "read":
        return "ok " + handle.pread(numbers[1], numbers[0]).hex()
    if command == "write":
        handle.pwrite(numbers[2].to_bytes(8, "little") * (numbers[1] // 8), numbers[0])
    elif command == "flush":
        handle.flush()
    elif command == "trim":
        handle.trim(numbers[1], numbers[0])
    else:
        raise ValueError(command)
    return "ok"


def serve(uri):
    handle = connect(uri)
    print("connected", flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        try:
            answer = do(handle, command, [int(number) for number in numbers])
        except nbd.Error as error:
            answer = f"error {error.errno or error.string}"
        print(answer, flush=True)


def crowd(uri, count, offset, length):
    handles = [connect(uri) for _ in range(count)]
    buffers = [nbd.Buffer(length) for _ in range(count)]
    print("connected", flush=True)
    cookies = [handle.aio_pread(buffer, offset) for handle, buffer in zip(handles, buffers)]
    for handle, cookie in zip(handles, cookies):
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
    answers = {bytes(buffer.to_bytearray()) for buffer in buffers}
    print(f"{len(answers)} {answers.pop().hex()}", flush=True)


if sys.argv[1] == "--crowd":
    crowd(sys.argv[2], *(int(number) for number in sys.argv[3:6]))
else:
    serve(sys.argv[1])
