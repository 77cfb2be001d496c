#!/usr/bin/env python3
"""Submits a job through a node's local API and streams its output. Standard library only.

    python3 examples/light_node.py                                   # echo a line on two miners
    python3 examples/light_node.py --model PUBLISHER/NAME --input image.bin --proof job.proof
    SUNDARA_API=http://127.0.0.1:4102 python3 examples/light_node.py --builtin echo --text hello

Standard output gets the job's output; everything about the job goes to standard error. The output that is streamed is
provisional: the verdict names its digest, and the program fails if what it printed is something else.
"""

import argparse
import base64
import http.client
import json
import os
import sys
from urllib.parse import urlencode, urlsplit


class Api:
    """A node's API: one connection a request."""

    def __init__(self, url, timeout):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise SystemExit(f"{url}: name http://HOST:PORT")
        self.address = (parts.hostname, parts.port or 80)
        self.timeout = timeout

    def request(self, method, path, body=None, content_type=None):
        """The response, its status checked."""
        connection = http.client.HTTPConnection(*self.address, timeout=self.timeout)
        headers = {"content-type": content_type} if content_type else {}
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
        except OSError as error:
            raise SystemExit(f"cannot reach the API at {self.address[0]}:{self.address[1]}: {error}")
        if response.status >= 400:
            raise SystemExit(self.explain(response))
        return response

    @staticmethod
    def explain(response):
        """The API's words for what went wrong."""
        try:
            error = json.load(response)["error"]
            return f"{error['message']}" + (f"; {error['hint']}" if error.get("hint") else "")
        except (ValueError, KeyError):
            return f"status {response.status}, and not an answer of this API"

    def submit(self, order, payload):
        """Submits a job whose input is `payload`; returns its id."""
        query = urlencode({key: value for key, value in order.items() if value is not None})
        response = self.request("POST", f"/v1/jobs?{query}", payload, "application/octet-stream")
        return json.load(response)["id"]

    def events(self, job):
        """Yields (name, data) of every event of a job, until its end."""
        name, data = "", []
        for line in self.request("GET", f"/v1/jobs/{job}/events"):
            line = line.decode().rstrip("\r\n")
            if not line:
                if data:
                    yield name, json.loads("\n".join(data))
                name, data = "", []
                continue
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)

    def bytes(self, path):
        return self.request("GET", path).read()


def follow(api, job, out):
    """Prints output as it comes; returns the verdict."""
    printed = b""
    for name, data in api.events(job):
        if name == "acknowledged":
            note(f"validator {data['validator']} has it")
        elif name == "started":
            note(f"running, attempt {data['attempt']}")
        elif name == "output":
            piece = base64.b64decode(data["base64"])
            # Every attempt computes the same bytes: what an earlier one printed already is skipped.
            if data["offset"] <= len(printed) < data["offset"] + len(piece):
                new = piece[len(printed) - data["offset"] :]
                out.write(new)
                out.flush()
                printed += new
        elif name == "verdict":
            verified = api.bytes(f"/v1/jobs/{job}/output")
            if not verified.startswith(printed):
                raise SystemExit("what was streamed is not the verified output")
            out.write(verified[len(printed) :])
            out.flush()
            return data
        elif name == "failed":
            raise SystemExit(f"{data['reason']}: {data['message']}")
    raise SystemExit(f"the node stopped before job {job} ended")


def note(text):
    print(text, file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--api", default=os.environ.get("SUNDARA_API", "http://127.0.0.1:4102"))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="PUBLISHER/NAME[@VERSION]")
    what.add_argument("--builtin", help="reference job that every node has (default: echo)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", help="file, - for standard input")
    source.add_argument("--text", default="hello, mesh\n")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--proof", help="file that gets the proof, for `sundara-node attestation verify`")
    parser.add_argument("--timeout", type=float, default=600, help="seconds without a byte")
    args = parser.parse_args()

    if args.input == "-":
        payload = sys.stdin.buffer.read()
    elif args.input:
        with open(args.input, "rb") as file:
            payload = file.read()
    else:
        payload = args.text.encode()

    api = Api(args.api, args.timeout)
    order = {
        "model": args.model,
        "builtin": args.builtin if args.builtin or args.model else "echo",
        "replicas": args.replicas,
        "seed": args.seed,
        "stream": "true",
    }
    job = api.submit(order, payload)
    note(f"job {job}")
    verdict = follow(api, job, sys.stdout.buffer)
    note(f"{verdict['verdict']}, {verdict['outcome']} in {verdict['latency_ms']:.1f} ms, validator {verdict['validator']}")
    if args.proof:
        with open(args.proof, "wb") as file:
            file.write(api.bytes(f"/v1/jobs/{job}/proof"))
        note(f"proof in {args.proof}")
    return 0 if verdict["outcome"] == "completed" else 5


if __name__ == "__main__":
    sys.exit(main())
