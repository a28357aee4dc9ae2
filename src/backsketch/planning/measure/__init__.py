"""What can be measured of a backward pass: calls, repeatable passes, replays."""
