"""A real multi-node Kubernetes on one Linux machine, without Docker (`python -m e2e.cluster`); see README.md here.

    spec          what a cluster is: names, address ranges, timings (pure)
    daemons       command lines and configuration of every daemon (pure)
    binaries      the programs, built from pinned Go modules (toolchain: the Go that builds them)
    requirements  what the machine must have, with the cure where it has not
    pki, api      certificates and kubeconfigs; a small client of the API server
    supervise     starts, restarts and reaps daemons; pid1: the same as the first process of a machine
    machine       one machine: a set of kernel namespaces; disks: what lies on it before it is switched on;
                  cgroups, network, sysctls: what is outside of it
    images        the golden store: an image is unpacked once for all nodes; containerd, buildah: where images come
                  from and go to; registry: serves some to pods that pull
    faults        what tests break on purpose
    cluster       up, down, status; provider: this cluster, kind, or the one of $KUBECONFIG
    controlplane  etcd and an API server on loopback alone, for integration tests and benchmarks

This file imports nothing: pid 1 of a machine is Python too and should start fast.
"""
