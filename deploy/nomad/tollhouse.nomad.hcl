# Tollhouse under Nomad: a gateway on every edge client, two decision points, one quota service.
#
#   nomad job run -var config=etcd://10.0.0.1:2379 deploy/nomad/tollhouse.nomad.hcl

variable "config" {
  description = "Where the configuration is: etcd://HOST:PORT[,...]"
  type        = string
}

variable "redis" {
  description = "Where the quota's buckets are"
  type        = string
  default     = "redis://127.0.0.1:6379/0"
}

variable "gateway" {
  description = "NAMESPACE/NAME of the Gateway to run"
  type        = string
  default     = "edge/ingress"
}

variable "identities" {
  description = "Host directory with the gateway's cert.pem, key.pem and ca.pem"
  type        = string
  default     = "/etc/tollhouse/identities/edge-ingress"
}

job "tollhouse" {
  datacenters = ["*"]
  type        = "service"

  update {
    max_parallel     = 1
    min_healthy_time = "5s"
    healthy_deadline = "2m"
    auto_revert      = true
  }

  group "gateway" {
    count = 2

    constraint {
      distinct_hosts = true
    }

    # The gateway binds the ports of its Gateway's listeners on the host itself.
    network {
      mode = "host"
      port "https" {
        static = 8443
      }
      port "admin" {
        static       = 15000
        host_network = "loopback"
      }
    }

    service {
      name     = "tollhouse-gateway"
      provider = "nomad"
      port     = "https"

      check {
        type     = "tcp"
        interval = "5s"
        timeout  = "2s"
      }
    }

    # In-flight requests are finished after SIGTERM; new connections go elsewhere meanwhile.
    shutdown_delay = "2s"

    task "gateway" {
      driver       = "exec"
      user         = "tollhouse"
      kill_signal  = "SIGTERM"
      kill_timeout = "45s"

      config {
        command = "/opt/tollhouse/bin/tollhouse"
        args = [
          "gateway", var.gateway,
          "--config", var.config,
          "--identity", var.identities,
          "--redis", var.redis,
          "--pdp", "127.0.0.1:9191",
          "--admin", "127.0.0.1:15000",
          "--state", "${NOMAD_ALLOC_DIR}/data",
        ]
      }

      resources {
        cpu    = 1000
        memory = 512
      }
    }
  }

  group "pdp" {
    count = 2

    network {
      mode = "host"
      port "grpc" {
        static = 9191
      }
    }

    service {
      name     = "tollhouse-pdp"
      provider = "nomad"
      port     = "grpc"

      check {
        type     = "tcp"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "pdp" {
      driver       = "exec"
      user         = "tollhouse"
      kill_timeout = "30s"

      config {
        command = "/opt/tollhouse/bin/tollhouse"
        args = [
          "pdp",
          "--config", var.config,
          "--listen", "127.0.0.1:9191",
          "--state", "${NOMAD_ALLOC_DIR}/data",
        ]
      }

      resources {
        cpu    = 1000
        memory = 1024
      }
    }
  }

  group "quota" {
    count = 1

    network {
      mode = "host"
      port "grpc" {
        static = 8081
      }
    }

    service {
      name     = "tollhouse-quota"
      provider = "nomad"
      port     = "grpc"

      check {
        type     = "tcp"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "quota" {
      driver       = "exec"
      user         = "tollhouse"
      kill_timeout = "30s"

      config {
        command = "/opt/tollhouse/bin/tollhouse"
        args = [
          "quota",
          "--config", var.config,
          "--listen", "127.0.0.1:8081",
          "--redis", var.redis,
          "--state", "${NOMAD_ALLOC_DIR}/data",
        ]
      }

      resources {
        cpu    = 500
        memory = 256
      }
    }
  }
}
