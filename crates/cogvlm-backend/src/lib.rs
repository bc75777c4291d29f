//! cogvlm-backend
