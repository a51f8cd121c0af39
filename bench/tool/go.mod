module tollhouse.dev/bench/tool

go 1.26
