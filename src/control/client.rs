//! Asking the node over its control socket.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::error::{Failure, Outcome};
use crate::limits::CONTROL_ANSWER_BYTES;

/// A node's control socket.
#[derive(Clone, Debug)]
pub struct ControlClient {
    socket: PathBuf,
}

impl ControlClient {
    /// Nothing is connected yet.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// Where it is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Outcome<T> {
        self.whole(Method::GET, path, Bytes::new()).await
    }

    /// `DELETE`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Outcome<T> {
        self.whole(Method::DELETE, path, Bytes::new()).await
    }

    /// `POST` with a JSON body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Outcome<T> {
        let body = serde_json::to_vec(body).map_err(Failure::failed)?;
        self.whole(Method::POST, path, body.into()).await
    }

    /// `POST` whose answer is a stream of JSON lines; ends when `each` returns a value or the stream ends.
    pub async fn stream<L: DeserializeOwned, T>(
        &self,
        path: &str,
        body: &impl Serialize,
        mut each: impl FnMut(L) -> Option<Outcome<T>>,
    ) -> Outcome<T> {
        let body = serde_json::to_vec(body).map_err(Failure::failed)?;
        let response = self.send(Method::POST, path, body.into()).await?;
        self.read_lines(response, &mut each).await?.unwrap_or_else(|| Err(self.lost("the answer ended early")))
    }

    /// `GET` whose answer is a stream of JSON lines, to its end or to the first failure.
    pub async fn lines<L: DeserializeOwned>(&self, path: &str, mut each: impl FnMut(L) -> Outcome<()>) -> Outcome<()> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        self.read_lines(response, &mut |line| each(line).err().map(Err)).await?.unwrap_or(Ok(()))
    }

    /// What `each` ends with; `None` when the stream ends before.
    async fn read_lines<L: DeserializeOwned, T>(
        &self,
        mut response: Response<Incoming>,
        each: &mut impl FnMut(L) -> Option<Outcome<T>>,
    ) -> Outcome<Option<Outcome<T>>> {
        let mut pending = Vec::new();
        while let Some(frame) = response.body_mut().frame().await {
            let frame = frame.map_err(|error| self.lost(error))?;
            pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let line = serde_json::from_slice(&line).map_err(|error| self.strange(error))?;
                if let Some(outcome) = each(line) {
                    return Ok(Some(outcome));
                }
            }
            if pending.len() > CONTROL_ANSWER_BYTES {
                return Err(self.strange("a line without end"));
            }
        }
        Ok(None)
    }

    async fn whole<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Outcome<T> {
        let response = self.send(method, path, body).await?;
        let body = collect(response).await.map_err(|error| self.lost(error))?;
        serde_json::from_slice(&body).map_err(|error| self.strange(error))
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Outcome<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            Failure::unreachable(format!(
                "cannot reach the node at {}: {error}; is `lazy-migrate serve` running there? (--control or \
                 LAZY_MIGRATE_CONTROL names another socket)",
                self.socket.display()
            ))
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(Failure::failed)?;
        let response = sender.send_request(request).await.map_err(|error| self.lost(error))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let status = response.status();
        let body = collect(response).await.map_err(|error| self.lost(error))?;
        Err(serde_json::from_slice(&body).unwrap_or_else(|_| {
            self.strange(format!("{status}: {}", String::from_utf8_lossy(&body[..body.len().min(200)])))
        }))
    }

    fn lost(&self, error: impl std::fmt::Display) -> Failure {
        Failure::unreachable(format!(
            "the node at {} went away while it answered: {error}; look at its log, then at `lazy-migrate status`",
            self.socket.display()
        ))
    }

    fn strange(&self, what: impl std::fmt::Display) -> Failure {
        Failure::failed(format!(
            "the node at {} answered something that is not understood: {what}; are node and command of the same version?",
            self.socket.display()
        ))
    }
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    Ok(http_body_util::Limited::new(response.into_body(), CONTROL_ANSWER_BYTES).collect().await?.to_bytes())
}
