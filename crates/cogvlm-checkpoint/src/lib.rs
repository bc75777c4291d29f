//! cogvlm-checkpoint
