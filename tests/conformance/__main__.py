"""`python -m tests.conformance [TEST ...]`: runs the suite, or some of its tests, and prints what passed."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import servers
from tests.conformance.api import Api
from tests.conformance.build import built, module
from tests.conformance.gateways import Cluster, gateway_class
from tests.conformance.store import CORE, Store, gateway_api_kinds

CLASS = "tollhouse"
CONTROLLER = "tollhouse.dev/gateway-controller"
PROFILES = "GATEWAY-HTTP,GATEWAY-GRPC,GATEWAY-TLS,GATEWAY-TCP,GATEWAY-UDP"


def rootless() -> None:
    """The suite's Gateways listen at port 80: who may not goes on in namespaces of its own, where it may."""
    if os.geteuid() == 0:
        return
    os.execvp("unshare", ["unshare", "--map-root-user", "--net", sys.executable, "-m", "tests.conformance", *sys.argv[1:]])


def loopback_up() -> None:
    """In a new network namespace the loopback interface is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(sock, 0x8913, request))[1]  # SIOCGIFFLAGS
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", flags | 1))  # SIOCSIFFLAGS, IFF_UP


def main() -> int:
    """Runs the suite; 0 when everything that was run passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("tests", nargs="*", metavar="TEST", help="short names of tests, such as HTTPRouteMatching (default: all)")
    parser.add_argument(
        "--features",
        default="",
        help="extended features that are claimed, separated by commas, or all (default: those that the class claims)",
    )
    parser.add_argument("--profiles", default=PROFILES)
    parser.add_argument("--report", type=Path, help="where the suite's report goes")
    parser.add_argument("--patience", default="20s", help="how long the suite waits for a condition or an answer")
    parser.add_argument("--keep", action="store_true", help="leave the directory with manifests and logs behind")
    options = parser.parse_args()
    rootless()
    loopback_up()
    binaries = built()
    folder = Path(tempfile.mkdtemp(prefix="tollhouse-conformance-"))
    kinds, definitions = gateway_api_kinds(module("sigs.k8s.io/gateway-api") / "config/crd/experimental")
    kinds = CORE + kinds
    store = Store()
    cluster = Cluster(store, kinds, binaries, CLASS, folder)
    api = Api(store, kinds, cluster.pods.logs)
    by_kind = cluster.kinds
    for body in definitions:
        store.create(by_kind["CustomResourceDefinition"], "", body)
    store.create(by_kind["GatewayClass"], "", gateway_class(CLASS, CONTROLLER))
    cluster.start()
    classes = by_kind["GatewayClass"]
    servers.wait_for(
        "the status of the class", lambda: (store.get(classes, "", CLASS) or {}).get("status", {}).get("supportedFeatures"), seconds=60
    )
    environment = {
        **os.environ,
        "KUBE_API": api.url,
        "GATEWAY_CLASS": CLASS,
        "CONFORMANCE_FEATURES": options.features,
        "CONFORMANCE_PROFILES": options.profiles,
        "CONFORMANCE_TESTS": ",".join(options.tests),
        "CONFORMANCE_PATIENCE": options.patience,
        "CONFORMANCE_REPORT": str(options.report or folder / "report.yaml"),
        "USABLE_ADDRESSES": "127.88.1.1",
        "UNUSABLE_ADDRESSES": "192.0.2.1",
    }
    try:
        done = subprocess.run([binaries["suite"], "-test.v", "-test.timeout", "60m"], env=environment, cwd=folder, check=False)
    finally:
        cluster.close()
        if options.keep:
            print(f"manifests and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
