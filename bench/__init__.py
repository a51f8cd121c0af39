"""Side-by-side measurements: Tollhouse and what a careful team would run in its place, in one interleaved run.

`python -m bench` builds the peers, starts each contender by itself, gives all of them the same load in turn, and prints one Markdown
table. What is compared is CPU time per request, summed over every process of a contender (user and system, from /proc); the load and
the upstream are the same Go program for all and are not counted. Figures on a shared machine drift: read the ratios.
"""
