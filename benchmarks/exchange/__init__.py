"""What an exchange costs a step, beside Lightning's DDP and decent-dp: ranks on one host."""
